"""Chooses the decode workers that one request asks, and sums up why none of them served it."""

import time
from collections.abc import Callable
from typing import Protocol

from spectrumkv.common.errors import (
    DataLossError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    SpectrumKVError,
    UnavailableError,
)
from spectrumkv.common.rpc.scope import RpcScope
from spectrumkv.prefill_server.workers.worker import DecodeWorker

# While workers start, or restart one after another, none may be ready when the first request comes or another worker
# leaves: a request waits for so long until one is. Longer than the pauses between attempts to connect.
RESTART_SECONDS = 2.0


class Candidates(Protocol):
    """What the choice needs to know of the workers; `WorkerPool` knows it."""

    def ranked(self, slots: int, needs_basis: bool = False) -> list[DecodeWorker]:
        """Return workers, the best first."""

    @property
    def ejected(self) -> list[DecodeWorker]:
        """Workers that requests avoid because they failed several in a row."""

    @property
    def unresolved(self) -> list[str]:
        """A sentence for each name that stands for no worker yet."""

    @property
    def any_expected(self) -> bool:
        """Whether a worker that takes no requests yet is likely to do so soon."""

    def wait(self, until: Callable[[], bool], seconds: float) -> None:
        """Wait until something is true that may become so when a worker comes or goes."""


class WorkerSelector:
    """Chooses the workers that one request asks: each worker once in its epoch.

    Args:
        pool: the workers.
        scope: the client's RPC.
        slots: what the request will reserve.
        needs_basis: whether the request's codec needs the basis.
    """

    def __init__(self, pool: Candidates, scope: RpcScope, slots: int, needs_basis: bool) -> None:
        self._pool = pool
        self._scope = scope
        self._slots = slots
        self._needs_basis = needs_basis
        self._asked: dict[DecodeWorker, int] = {}
        self._refusals: dict[DecodeWorker, SpectrumKVError] = {}
        self._patience = RESTART_SECONDS

    def next(self) -> DecodeWorker | None:
        """Choose the best worker that was not asked in its present epoch.

        Where no such worker takes requests and one is expected, the selector waits a little: a worker that is asked
        while it starts refuses, or cannot be reached.

        Returns:
            None where every worker was asked.

        Raises:
            SpectrumKVError: the request ended.
        """
        found = self._untried()
        if (found is None or not found.accepting) and self._pool.any_expected and self._patience > 0:
            started = time.monotonic()
            self._pool.wait(lambda: self._scope.ended or self._ready() is not None, self._patience)
            self._patience -= time.monotonic() - started
            self._scope.check()
            found = self._ready() or found
        if found is None:
            found = self._last_resort()
        if found is not None:
            self._asked[found] = found.epoch
        return found

    def refused(self, worker: DecodeWorker, error: SpectrumKVError) -> None:
        """Remember why a worker did not serve the request."""
        self._refusals[worker] = error

    def no_worker(self) -> SpectrumKVError:
        """Return an error that sums up why no worker served the request, or says how the last one failed it."""
        refusals = list(self._refusals.values())
        avoided = [
            f"decode worker {worker.address} is left alone for a while, since it failed one request after another"
            for worker in self._pool.ejected
            if worker not in self._asked
        ]
        reasons = "; ".join([*(refusal.message for refusal in refusals), *avoided, *self._pool.unresolved])
        full = [refusal for refusal in refusals if isinstance(refusal, ResourceExhaustedError)]
        if full:
            delay = min(refusal.retry_after_seconds for refusal in full)
            return ResourceExhaustedError(f"no decode worker has room: {reasons}", delay)
        failed = (InternalError, DataLossError, InvalidArgumentError)
        failures = [refusal for refusal in refusals if isinstance(refusal, failed)]
        if failures:
            return failures[-1]
        if refusals and all(isinstance(refusal, FailedPreconditionError) for refusal in refusals):
            return FailedPreconditionError(f"no decode worker can serve this: {reasons}")
        all_away = all(isinstance(refusal, UnavailableError) for refusal in refusals)
        problem = "can be reached; start one or name it with --decode" if all_away else "that fits can be reached"
        return UnavailableError(f"no decode worker {problem}: {reasons}")

    def _last_resort(self) -> DecodeWorker | None:
        """Return an ejected worker where no other could ever serve the request: one that is full may do so later."""
        if any(isinstance(refusal, ResourceExhaustedError) for refusal in self._refusals.values()):
            return None
        return next((one for one in self._pool.ejected if one.accepting and one not in self._asked), None)

    def _ranked(self) -> list[DecodeWorker]:
        return self._pool.ranked(self._slots, self._needs_basis)

    def _untried(self) -> DecodeWorker | None:
        """Return the best worker that was never asked, even if it seems to take no requests: that may be old news."""
        return next((worker for worker in self._ranked() if worker not in self._asked), None)

    def _ready(self) -> DecodeWorker | None:
        """Return the best worker that takes requests and was not asked since it began to take them."""
        candidates = (worker for worker in self._ranked() if worker.accepting)
        return next((worker for worker in candidates if worker.epoch != self._asked.get(worker)), None)
