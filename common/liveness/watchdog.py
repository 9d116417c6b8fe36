"""Ends what hangs: finds work that makes no progress, and bounds how long a process takes to end."""

import os
import sys
import threading
import traceback
from collections.abc import Mapping

from spectrumkv.common.liveness.vitals import Pulse, Vitals
from spectrumkv.common.liveness.watchdog_timer import WatchdogTimer

# The watchdog counts its own looks and no seconds: a process that was stopped (SIGSTOP) did not hang meanwhile.
LOOKS = 10
# A thread that keeps Python's global lock stops the watchdog too; after so many limits without a look the process
# ends.
LIMITS_WITHOUT_A_LOOK = 5


class Watchdog:
    """Watches the pulses on a thread of its own, and fails the vitals where one of them stands still.

    Where even that thread cannot run, a timer that needs no Python ends the process with status 1. A process has one
    such timer, so it has one watchdog.

    Args:
        vitals: the pulses.
        limit_seconds: how long work may take without a beat.
    """

    def __init__(self, vitals: Vitals, limit_seconds: float) -> None:
        self._vitals = vitals
        self._limit_seconds = limit_seconds
        self._timer = WatchdogTimer(_log_that_does_not_block())
        self._lock = threading.Lock()
        self._ending = False

    def start(self) -> None:
        """Watch from now on."""
        self._postpone_end()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def end_within(self, seconds: float) -> None:
        """End the process with status 1 once `seconds` have passed, all stacks in the log, whatever hangs then."""
        with self._lock:
            self._ending = True
            self._timer.set(seconds, f"this process has not ended within {seconds:g} s, and something in it hangs:")

    def _watch(self) -> None:
        looks: dict[Pulse, int] = {}
        before: Mapping[Pulse, int] = {}
        pause = threading.Event()
        while LOOKS not in looks.values():
            self._postpone_end()
            pause.wait(self._limit_seconds / LOOKS)
            pulses = self._vitals.pulses
            looks = {
                pulse: looks.get(pulse, 0) + 1 if before.get(pulse) == beat else 0 for pulse, beat in pulses.items()
            }
            before = pulses
        stuck = next(pulse for pulse, count in looks.items() if count == LOOKS)
        self._vitals.fail(
            f"{stuck.what} has made no progress for {self._limit_seconds:g} s (--stuck-after); its thread is at\n"
            f"{stack_of(stuck.thread)}"
        )

    def _postpone_end(self) -> None:
        seconds = LIMITS_WITHOUT_A_LOOK * self._limit_seconds
        with self._lock:
            if not self._ending:
                self._timer.set(seconds, f"no Python has run in this process for {seconds:g} s (--stuck-after):")


def _log_that_does_not_block() -> int:
    """Return a descriptor of standard error that does not block: a process must end though nobody reads its log."""
    try:
        return os.open("/proc/self/fd/2", os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK)
    except OSError:
        # Standard error is a socket, or this is no Linux.
        return 2


def stack_of(thread: int | None) -> str:
    """Return where a thread is, for the log.

    Args:
        thread: its identifier; None where it never began.
    """
    frame = None if thread is None else sys._current_frames().get(thread)
    return "".join(traceback.format_stack(frame)).rstrip() if frame else "(it has ended)"
