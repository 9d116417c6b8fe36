"""Tells decode workers that are slow from the others, by the time that their tokens take.

A slow worker fails nothing, so that no circuit breaker sees it, and it has free slots as long as no request goes
there. docs/adr/0156-slow-workers.md says what follows from this, and what was measured.
"""

import math
import statistics
import time
from collections import deque
from collections.abc import Sequence

# Gaps between tokens that a worker is judged by: its latest ones, and no fewer than so many.
LATEST_GAPS, FEWEST_GAPS = 32, 5
# A worker is slow whose tokens take so many times as long as is usual among the workers, and longer by so much: less
# is a matter of how many requests each has.
SLOW_TIMES, SLOW_SECONDS = 3.0, 0.005
# A slow worker to which no request went for so long gets one, which shows whether it still is; then for twice as long
# each time, up to the longest.
TRIAL_SECONDS, LONGEST_TRIAL_SECONDS = 5.0, 60.0


class TokenPace:
    """Remembers how long the latest tokens of one worker took, and says whether that is slow.

    The threads of all requests write it without a lock: each writes to a deque, or one number.
    """

    def __init__(self) -> None:
        self._gaps: deque[float] = deque(maxlen=LATEST_GAPS)
        self._slow = False
        self._pause = TRIAL_SECONDS
        self._trial_at = 0.0

    @property
    def seconds(self) -> float | None:
        """The median of the latest gaps; None before there are enough."""
        gaps = tuple(self._gaps)
        return statistics.median(gaps) if len(gaps) >= FEWEST_GAPS else None

    def add(self, seconds: float) -> None:
        """Take in how long one token took after the one before it."""
        self._gaps.append(seconds)

    def begin(self) -> None:
        """Take in that a request goes to the worker; where the worker is slow, the request is its trial."""
        if self._slow:
            self._trial_at = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, LONGEST_TRIAL_SECONDS)

    def is_slow(self, usual: float | None) -> bool:
        """Return whether requests should rather go to other workers: it is slow, and no trial is due.

        Args:
            usual: the pace that is usual among all workers; None where that is unknown.
        """
        seconds = self.seconds
        limit = math.inf if usual is None else max(SLOW_TIMES * usual, usual + SLOW_SECONDS)
        self._slow, was_slow = seconds is not None and seconds > limit, self._slow
        if not self._slow:
            self._pause = TRIAL_SECONDS
        elif not was_slow:
            self._trial_at = time.monotonic() + TRIAL_SECONDS
        return self._slow and time.monotonic() < self._trial_at


def usual_pace(paces: Sequence[TokenPace]) -> float | None:
    """Return what is usual among workers: half of them are no slower. None where fewer than two are known.

    Args:
        paces: of the workers that take requests.
    """
    known = [seconds for pace in paces if (seconds := pace.seconds) is not None]
    return statistics.median_low(known) if len(known) > 1 else None
