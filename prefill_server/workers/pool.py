"""The decode workers that prefill knows, and how a request finds one that carries it to its end."""

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from types import TracebackType

from spectrumkv.common.errors import (
    BasisMissingError,
    FailedPreconditionError,
    ResourceExhaustedError,
    SpectrumKVError,
    UnavailableError,
)
from spectrumkv.common.kv.codecs.spectral.basis import SpectralBasis
from spectrumkv.common.rpc.scope import RpcScope
from spectrumkv.common.security import ChannelSecurity
from spectrumkv.common.service.config import Address
from spectrumkv.common.telemetry.metrics import Metrics
from spectrumkv.common.telemetry.request_log import current_request
from spectrumkv.prefill_server.transfer.pipeline import KvPipeline
from spectrumkv.prefill_server.workers.lease import DecodeLease
from spectrumkv.prefill_server.workers.worker import DecodeWorker

logger = logging.getLogger(__name__)

# While workers start, or restart one after another, one that serves may not be found yet when the first request comes
# or another one leaves: for so long a request waits for it. Longer than the pauses between attempts to connect.
RESTART_SECONDS = 2.0
# Labels of `decode_workers_passed_over`.
LOST = "lost"
_REASONS: dict[type[SpectrumKVError], str] = {
    ResourceExhaustedError: "full",
    UnavailableError: "unavailable",
    FailedPreconditionError: "unfit",
}


class WorkerPool:
    """The decode workers that requests can go to.

    Args:
        addresses: at least one.
        security: how the channels to them are guarded.
        metrics: told of workers passed over and of answers that arrive damaged.
        basis: what the KV is coded in; a worker that lacks it gets it.
    """

    def __init__(
        self,
        addresses: Sequence[Address],
        security: ChannelSecurity,
        metrics: Metrics,
        basis: SpectralBasis | None = None,
    ) -> None:
        self.metrics = metrics
        self.basis = basis
        self._changed = threading.Condition()
        self._workers = [DecodeWorker(address, security, metrics, self.wake) for address in addresses]
        self._turns = itertools.cycle(range(len(self._workers)))

    def attempts(
        self, slots: int, make_pipeline: Callable[[Address], KvPipeline], scope: RpcScope
    ) -> Iterator["Dispatch"]:
        """Yield attempts to serve a request, each on another worker, until one ends without losing its worker.

        ```
        for attempt in workers.attempts(…):
            with attempt as lease:
                …  # once more with each lease
                attempt.commit()
        ```

        Args:
            slots: what the request will reserve.
            make_pipeline: makes a fresh pipeline for each worker tried, told its address.
            scope: the client's RPC.

        Raises:
            ResourceExhaustedError: a worker that could serve the request is full; the delay is the shortest named.
            UnavailableError: a worker cannot be reached, and no other one could ever serve it.
            FailedPreconditionError: no worker could ever serve it.
            SpectrumKVError: the request itself is at fault, or ended.
        """
        search = WorkerSelector(self, slots, make_pipeline, scope)
        scope.on_end(self.wake)
        while True:
            attempt = Dispatch(search)
            yield attempt
            if not attempt.lost:
                return

    def ranked(self) -> list[DecodeWorker]:
        """All workers: those that take requests first, of them those with the most free slots, equals in turn."""
        with self._changed:
            first = next(self._turns)
        in_turn = self._workers[first:] + self._workers[:first]
        return sorted(in_turn, key=lambda worker: (not worker.accepting, -worker.free_slots))

    @property
    def away(self) -> list[Address]:
        """Those that do not answer, or take no requests, as far as is known."""
        return [worker.address for worker in self._workers if not worker.accepting]

    @property
    def any_expected(self) -> bool:
        """Whether a worker starts or restarts, so that it will soon be there, or is and was not found yet."""
        return any(worker.expected for worker in self._workers)

    def wait(self, until: Callable[[], bool], seconds: float) -> None:
        """Wait until something is true that may become so when a worker comes or goes."""
        with self._changed:
            self._changed.wait_for(until, seconds)

    def wake(self) -> None:
        """Let those who wait look again."""
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Close all channels."""
        for worker in self._workers:
            worker.close()


class WorkerSelector:
    """One request's way through the workers: each is asked once in its epoch.

    Args:
        workers: where to look.
        slots: what the request will reserve.
        make_pipeline: makes a fresh pipeline for each worker tried, told its address.
        scope: the client's RPC.
    """

    def __init__(
        self, workers: WorkerPool, slots: int, make_pipeline: Callable[[Address], KvPipeline], scope: RpcScope
    ) -> None:
        self._workers = workers
        self._slots = slots
        self._make_pipeline = make_pipeline
        self._scope = scope
        self._asked: dict[DecodeWorker, int] = {}
        self._refusals: dict[DecodeWorker, SpectrumKVError] = {}
        self._patience = RESTART_SECONDS

    def lease(self, held: ExitStack) -> tuple[DecodeWorker, DecodeLease]:
        """Return a worker that admitted the request, and the lease on it, which `held` ends.

        Raises:
            SpectrumKVError: as `WorkerPool.attempts`.
        """
        while (worker := self._next()) is not None:
            self._asked[worker] = worker.epoch
            with ExitStack() as trial:
                trial.enter_context(worker.holding(self._slots))
                try:
                    lease = trial.enter_context(self._lease_from(worker))
                except (ResourceExhaustedError, UnavailableError, FailedPreconditionError) as refusal:
                    self.pass_over(worker, refusal, _reason(refusal))
                    continue
                held.push(trial.pop_all())
                return worker, lease
        raise _no_worker(list(self._refusals.values()))

    def _lease_from(self, worker: DecodeWorker) -> DecodeLease:
        """Return a lease from one worker, which is sent the codec's basis if it lacks that."""
        basis, delivered = self._workers.basis, worker.basis_upload.count
        try:
            return self._ask(worker)
        except BasisMissingError:
            if basis is None:
                raise
        worker.basis_upload.deliver(basis, delivered, self._scope)
        return self._ask(worker)

    def _ask(self, worker: DecodeWorker) -> DecodeLease:
        metrics = self._workers.metrics
        return DecodeLease(
            worker.address, worker.open_stream, self._make_pipeline(worker.address), self._scope, metrics
        )

    def pass_over(self, worker: DecodeWorker, error: SpectrumKVError, reason: str) -> None:
        """Take in that a worker did not serve the request."""
        logger.warning("%s: %s", "moved on" if reason == LOST else "passed over", error.message)
        self._workers.metrics.decode_workers_passed_over.labels(reason).inc()
        self._refusals[worker] = error
        if isinstance(error, UnavailableError):
            worker.lost(leaving=error.retry_after_seconds is not None)

    def _next(self) -> DecodeWorker | None:
        """The best worker that was not asked in this epoch of it; None where all were.

        Where none takes requests and one is expected, it waits a little: a worker that is asked while it starts
        refuses, or cannot be reached.
        """
        found = self._untried()
        if (found is None or not found.accepting) and self._workers.any_expected and self._patience > 0:
            started = time.monotonic()
            self._workers.wait(lambda: self._scope.ended or self._ready() is not None, self._patience)
            self._patience -= time.monotonic() - started
            self._scope.check()
            found = self._ready() or found
        return found

    def _untried(self) -> DecodeWorker | None:
        """The best worker that was never asked, whether or not it takes requests: what is known may be old."""
        return next((worker for worker in self._workers.ranked() if worker not in self._asked), None)

    def _ready(self) -> DecodeWorker | None:
        """The best worker that takes requests and was not asked since it began to."""
        candidates = (worker for worker in self._workers.ranked() if worker.accepting)
        return next((worker for worker in candidates if worker.epoch != self._asked.get(worker)), None)


class Dispatch:
    """One worker's chance at a request: a context manager that gives the lease on it.

    A worker that is lost before `commit` ends the block and no more: the request goes on to the next worker.

    Attributes:
        lost: the worker was lost, and another attempt follows.
    """

    def __init__(self, search: WorkerSelector) -> None:
        self.lost = False
        self._search = search
        self._held = ExitStack()
        self._committed = False

    def commit(self) -> None:
        """Say that the client has what only this worker can go on from."""
        self._committed = True

    def __enter__(self) -> DecodeLease:
        current_request().begin_stage("reserve")
        self._worker, lease = self._search.lease(self._held)
        return lease

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._held.close()
        self.lost = isinstance(error, UnavailableError) and not self._committed
        if self.lost:
            assert isinstance(error, UnavailableError)
            self._search.pass_over(self._worker, error, LOST)
        return self.lost


def _reason(refusal: SpectrumKVError) -> str:
    return next(reason for kind, reason in _REASONS.items() if isinstance(refusal, kind))


def _no_worker(refusals: Sequence[SpectrumKVError]) -> SpectrumKVError:
    """Sum up why no worker took a request."""
    reasons = "; ".join(refusal.message for refusal in refusals)
    full = [refusal for refusal in refusals if isinstance(refusal, ResourceExhaustedError)]
    if full:
        delay = min(refusal.retry_after_seconds for refusal in full)
        return ResourceExhaustedError(f"no decode worker has room: {reasons}", delay)
    if all(isinstance(refusal, FailedPreconditionError) for refusal in refusals):
        return FailedPreconditionError(f"no decode worker can serve this: {reasons}")
    all_away = all(isinstance(refusal, UnavailableError) for refusal in refusals)
    problem = "can be reached; start one or name it with --decode" if all_away else "that fits can be reached"
    return UnavailableError(f"no decode worker {problem}: {reasons}")
