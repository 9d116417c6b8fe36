"""A watchdog timer as computers have one: it ends the process unless it is set again, and needs no Python."""

import faulthandler
import signal
import threading

import numpy as np
from numpy.typing import NDArray

from spectrumkv.kernels.jit.countdown import ADDRESS, LAST_NAP, LENGTH, NAPS, NOT_COUNTED, count_naps

# The timer counts its own naps and no seconds: a process that was stopped (SIGSTOP, a debugger, a paused container)
# could do nothing meanwhile, and must not end because it wakes up late.
NAP_SECONDS = 0.1
# Nothing else uses the last of the real-time signals. Its handler is `faulthandler`'s, which needs no Python either.
DUMP_SIGNAL = signal.SIGRTMAX
EXIT_STATUS = 1


class WatchdogTimer:
    """Ends the process with status 1 once its time is over; a sentence and all stacks are in the log then.

    A thread without Python's global lock counts, so that it ends the process whatever the other threads hold. A
    process has one such timer.

    Args:
        log: descriptor of the log, which must not block.
    """

    def __init__(self, log: int) -> None:
        self._log = log
        self._lock = threading.Lock()
        self._shared: NDArray[np.int64] = np.zeros(4, np.int64)
        self._texts: list[NDArray[np.uint8]] = []

    def set(self, seconds: float, sentence: str) -> None:
        """End the process once `seconds` have passed, unless this is called again before.

        Args:
            seconds: not counted while the process is stopped.
            sentence: says why the process ends.
        """
        text = np.frombuffer(f"{sentence}\n".encode(), np.uint8)
        with self._lock:
            first = not self._texts
            # The one before may be on its way into the log.
            self._texts = [*self._texts[-1:], text]
            self._shared[[ADDRESS, LENGTH]] = text.ctypes.data, text.size
            self._shared[LAST_NAP] = self._shared[NAPS] + max(1, round(seconds / NAP_SECONDS))
            if first:
                self._start()

    def _start(self) -> None:
        faulthandler.register(DUMP_SIGNAL, file=self._log, all_threads=True)
        arguments = (np.uint32(NAP_SECONDS * 1e6), self._log, int(DUMP_SIGNAL), EXIT_STATUS)
        # Compiling needs Python, which nobody may run any more once this has returned.
        count_naps(np.full(4, NOT_COUNTED, np.int64), *arguments)
        thread = threading.Thread(target=count_naps, args=(self._shared, *arguments), name="watchdog-timer")
        thread.daemon = True
        thread.start()
