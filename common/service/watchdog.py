"""Ends what hangs: finds a model that makes no progress, and bounds how long a process takes to end."""

import faulthandler
import sys
import threading
import traceback

from spectrumkv.common.service.vitals import Vitals

# The watchdog counts its own looks and no seconds: a process that was stopped (SIGSTOP) did not hang meanwhile.
LOOKS = 10
# A thread that keeps Python's global lock stops the watchdog too; after so many limits without a look the process
# ends. Their number is as high as it is because this clock does not stop with the process.
LIMITS_WITHOUT_A_LOOK = 5


class Watchdog:
    """Watches a pulse on a thread of its own, and fails the vitals where it stands still.

    Where even that thread cannot run, a timer of `faulthandler`, which needs no Python, ends the process with status
    1. A process has one such timer, so it has one watchdog.

    Args:
        vitals: the pulse.
        limit_seconds: how long work may take without a beat.
    """

    def __init__(self, vitals: Vitals, limit_seconds: float) -> None:
        self._vitals = vitals
        self._limit_seconds = limit_seconds
        self._lock = threading.Lock()
        self._ending = False

    def start(self) -> None:
        """Watch from now on."""
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def end_within(self, seconds: float) -> None:
        """End the process with status 1 once `seconds` have passed, all stacks in the log, whatever hangs then."""
        with self._lock:
            self._ending = True
            faulthandler.dump_traceback_later(seconds, exit=True)

    def _watch(self) -> None:
        looks, before = 0, None
        pause = threading.Event()
        while looks < LOOKS:
            self._postpone_end()
            pause.wait(self._limit_seconds / LOOKS)
            pulse = self._vitals.pulse
            looks = looks + 1 if pulse is not None and pulse == before else 0
            before = pulse
        assert before is not None
        faulthandler.dump_traceback()
        self._vitals.fail(
            f"the model has made no progress for {self._limit_seconds:g} s (--stuck-after); its thread is at\n"
            f"{_stack_of(before[0])}"
        )

    def _postpone_end(self) -> None:
        with self._lock:
            if not self._ending:
                faulthandler.dump_traceback_later(LIMITS_WITHOUT_A_LOOK * self._limit_seconds, exit=True)


def _stack_of(thread: int) -> str:
    """Return where a thread is; faulthandler shows a hundred threads at most, perhaps without this one."""
    frame = sys._current_frames().get(thread)
    return "".join(traceback.format_stack(frame)).rstrip() if frame else "(it has ended)"
