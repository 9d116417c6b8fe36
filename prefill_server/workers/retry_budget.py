"""Bounds how many requests run again on another decode worker, so that failing workers do not multiply the load.

gRPC throttles retries for the same reason (github.com/grpc/proposal, A6, "Throttling retry attempts"); the form with
a share over a window is Finagle's. docs/adr/0116-outlier-ejection.md says why the bounds are as they are.
"""

import threading
import time
from collections import deque

WINDOW_SECONDS = 60.0
# Of the requests in the window, and besides it: a service with few requests can move some all the same.
SHARE = 0.2
RESERVE = 10


class RetryBudget:
    """Allows so many reruns for the requests of the last minute."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: deque[float] = deque()
        self._reruns: deque[float] = deque()

    def count_request(self) -> None:
        """Take in a new request."""
        with self._lock:
            self._forget()
            self._requests.append(time.monotonic())

    def take(self) -> bool:
        """Return whether one more request may run again; if so, it is counted."""
        with self._lock:
            self._forget()
            if len(self._reruns) >= RESERVE + SHARE * len(self._requests):
                return False
            self._reruns.append(time.monotonic())
            return True

    def _forget(self) -> None:
        horizon = time.monotonic() - WINDOW_SECONDS
        for stamps in (self._requests, self._reruns):
            while stamps and stamps[0] < horizon:
                stamps.popleft()
