"""Polls a condition until it holds, with a deadline; for what no event announces."""

import threading
import time
from collections.abc import Callable

WAIT_SECONDS = 20.0
LOOK_SECONDS = 0.005


def until(condition: Callable[[], bool]) -> None:
    """Look until something is true; fail after `WAIT_SECONDS`."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        threading.Event().wait(LOOK_SECONDS)
