"""Keeps requests away from a decode worker that admits them and then fails them, until a trial request succeeds.

Such a worker answers health checks, and since it frees its slots fastest it would be ranked first. The model is
Envoy's outlier detection in gRPC's form (github.com/grpc/proposal, A50); docs/adr/0116-outlier-ejection.md says what
differs.
"""

import threading
import time
from collections import deque

FAILURES_TO_EJECT = 3
# A worker that fails some requests only, such as long prompts, has others succeed between its failures: it is ejected
# where so many of its last requests failed.
LATEST_REQUESTS, FAILURES_OF_LATEST = 10, 5
# The first ejection; each further one without a success between them takes twice as long, up to the longest.
EJECTION_SECONDS = 5.0
LONGEST_EJECTION_SECONDS = 300.0


class CircuitBreaker:
    """Counts the requests that one worker failed, and says when to leave the worker alone.

    A request counts as failed where the worker admitted it and then ended it with an error of its own. After
    `FAILURES_TO_EJECT` in a row, or `FAILURES_OF_LATEST` of its `LATEST_REQUESTS`, the worker is ejected for a while.
    The first request after that is a trial: until it has its second token, no other one goes there, and where it
    fails the worker is ejected for longer.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._failures = 0
        self._latest: deque[bool] = deque(maxlen=LATEST_REQUESTS)
        self._ejections = 0
        self._ejected_until: float | None = None
        self._on_trial = False

    @property
    def ejected(self) -> bool:
        """Whether requests should go to other workers."""
        until = self._ejected_until
        return until is not None and (self._on_trial or time.monotonic() < until)

    def begin(self) -> bool:
        """Take in that a request goes to the worker.

        Returns:
            Whether the request is the trial.
        """
        with self._lock:
            if self._ejected_until is None or self.ejected:
                return False
            self._on_trial = True
            return True

    def abandon_trial(self) -> None:
        """Take in that the trial ended and says nothing of the worker; the next request is the trial."""
        with self._lock:
            self._on_trial = False

    def generated(self) -> None:
        """Take in that the worker generates: this ends an ejection, and one more failure begins the next one."""
        with self._lock:
            if self._ejected_until is not None:
                self._failures = FAILURES_TO_EJECT - 1
                self._ejected_until = None
                self._on_trial = False

    def succeeded(self) -> None:
        """Take in that the worker served a request to its end."""
        with self._lock:
            self._latest.append(False)
            self._failures = self._ejections = 0
            self._ejected_until = None
            self._on_trial = False

    def failed(self) -> float | None:
        """Take in that the worker failed a request.

        Returns:
            The seconds for which the worker is ejected, where this failure begins an ejection; otherwise None.
        """
        with self._lock:
            self._failures += 1
            self._latest.append(True)
            on_trial, self._on_trial = self._on_trial, False
            waiting = self._ejected_until is not None and not on_trial and time.monotonic() < self._ejected_until
            failing = self._failures >= FAILURES_TO_EJECT or sum(self._latest) >= FAILURES_OF_LATEST
            if waiting or not failing:
                return None
            self._latest.clear()
            self._failures = max(self._failures, FAILURES_TO_EJECT)
            seconds = min(EJECTION_SECONDS * 2.0**self._ejections, LONGEST_EJECTION_SECONDS)
            self._ejections += 1
            self._ejected_until = time.monotonic() + seconds
            return seconds
