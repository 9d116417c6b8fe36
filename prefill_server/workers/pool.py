"""Offers decode workers to a request, one after another, until one serves it."""

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from spectrumkv.common.errors import (
    BasisMissingError,
    DataLossError,
    FailedPreconditionError,
    InternalError,
    ResourceExhaustedError,
    SpectrumKVError,
    UnavailableError,
)
from spectrumkv.common.kv.codecs.basis import Basis
from spectrumkv.common.rpc.scope import RpcScope
from spectrumkv.common.security import ChannelSecurity
from spectrumkv.common.service.config import Address
from spectrumkv.common.telemetry.metrics import Metrics
from spectrumkv.common.telemetry.request_log import current_request
from spectrumkv.prefill_server.workers.dispatch import Dispatch, pass_over_reason
from spectrumkv.prefill_server.workers.retry_budget import RetryBudget
from spectrumkv.prefill_server.workers.worker import DecodeWorker

logger = logging.getLogger(__name__)

# While workers start, or restart one after another, none may be ready when the first request comes or another worker
# leaves: a request waits for so long until one is. Longer than the pauses between attempts to connect.
RESTART_SECONDS = 2.0
# A request whose KV another codec may write waits so long, and no longer than half of its time, for an upload of the
# codec's basis, counted from the upload's start.
BASIS_SECONDS = 2.0
# A request that makes workers fail must not go through all of them.
MOST_RERUNS = 2


class WorkerPool:
    """Offers decode workers to requests.

    Args:
        addresses: at least one.
        security: how the channels to the workers are guarded.
        metrics: counts workers passed over and answers that arrive damaged.
        basis: what the KV is coded in; every worker gets it; None where there is none.
    """

    def __init__(
        self,
        addresses: Sequence[Address],
        security: ChannelSecurity,
        metrics: Metrics,
        basis: Basis | None = None,
    ) -> None:
        self._metrics = metrics
        self._changed = threading.Condition()
        self._retry_budget = RetryBudget()
        self._workers = [DecodeWorker(address, security, metrics, self.wake, basis) for address in addresses]
        self._turns = itertools.cycle(range(len(self._workers)))

    def start(self) -> None:
        """Begin to follow the workers."""
        for worker in self._workers:
            worker.start()

    def offer(
        self, slots: int, scope: RpcScope, needs_basis: bool = False, may_fall_back: bool = False
    ) -> Iterator[Dispatch]:
        """Offer a request one worker after another, until one serves it.

        ```
        for dispatch in pool.offer(…):
            with dispatch, dispatch.open_lease(…) as lease:
                …  # once more with each lease
                dispatch.commit()
        ```

        Args:
            slots: what the request will reserve.
            scope: the client's RPC.
            needs_basis: whether the request's codec needs the basis; workers that have it are then offered first.
            may_fall_back: whether another codec may write the KV where the upload of the basis takes long.

        Yields:
            A dispatch to each worker. Where its block ends without an error of the worker, it is the last one.

        Raises:
            ResourceExhaustedError: a worker that could serve the request is full; the delay is the shortest named.
            UnavailableError: a worker cannot be reached, and no other one could ever serve the request.
            FailedPreconditionError: no worker could ever serve the request.
            SpectrumKVError: the request ended; or a worker failed it, and it may not run again.
        """
        selector = WorkerSelector(self, scope, needs_basis)
        scope.on_end(self.wake)
        self._retry_budget.count_request()
        reruns = 0
        current_request().begin_stage("reserve")
        while (worker := selector.next()) is not None:
            dispatch = Dispatch(worker, slots, scope)
            yield dispatch
            if isinstance(dispatch.error, BasisMissingError):
                patience = min(BASIS_SECONDS, scope.seconds_remaining / 2) if may_fall_back else None
                delivered = dispatch.wait_for_basis(patience)
                if delivered or (may_fall_back and isinstance(dispatch.error, BasisMissingError)):
                    dispatch = Dispatch(worker, slots, scope, lacks_basis=not delivered)
                    yield dispatch
            if dispatch.error is None:
                return
            self._pass_over(worker, dispatch.error, dispatch.admitted)
            selector.refused(worker, dispatch.error)
            if dispatch.admitted:
                reruns += 1
                if reruns > MOST_RERUNS or not self._retry_budget.take():
                    raise dispatch.error
        raise selector.no_worker()

    def ranked(self, needs_basis: bool = False) -> list[DecodeWorker]:
        """Return workers: those that take requests first, then by their free slots, equals in turn.

        Ejected workers are left out, unless none is left that takes requests.

        Args:
            needs_basis: whether those that have the codec's basis come before those that do not.
        """
        with self._changed:
            first = next(self._turns)
        in_turn = self._workers[first:] + self._workers[:first]
        sound = [worker for worker in in_turn if not worker.breaker.ejected]
        if any(worker.accepting for worker in sound):
            in_turn = sound

        def rank(worker: DecodeWorker) -> tuple[bool, bool, int]:
            lacking = needs_basis and not worker.basis_upload.delivered
            return not worker.accepting, lacking, -worker.free_slots

        return sorted(in_turn, key=rank)

    @property
    def away(self) -> list[Address]:
        """Workers that do not answer, or take no requests, as far as prefill knows."""
        return [worker.address for worker in self._workers if not worker.accepting]

    @property
    def ejected(self) -> list[DecodeWorker]:
        """Workers that requests avoid because they failed several in a row."""
        return [worker for worker in self._workers if worker.breaker.ejected]

    @property
    def any_expected(self) -> bool:
        """Whether a worker that takes no requests yet is likely to do so soon."""
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
        """Close all channels, and end the threads that follow the workers."""
        for worker in self._workers:
            worker.close()

    def _pass_over(self, worker: DecodeWorker, error: SpectrumKVError, admitted: bool) -> None:
        """Count and log that a worker did not serve a request, and take in what that says of the worker."""
        what = "a request goes on to another decode worker" if admitted else "a request passes over a decode worker"
        logger.warning("%s: %s", what, error.message)
        self._metrics.decode_workers_passed_over.labels(pass_over_reason(error, admitted)).inc()
        if isinstance(error, UnavailableError):
            worker.lost(leaving=error.retry_after_seconds is not None)
        if admitted:
            current_request().begin_stage("reserve")


class WorkerSelector:
    """Chooses the workers that one request asks: each worker once in its epoch.

    Args:
        pool: the workers.
        scope: the client's RPC.
        needs_basis: whether the request's codec needs the basis.
    """

    def __init__(self, pool: WorkerPool, scope: RpcScope, needs_basis: bool) -> None:
        self._pool = pool
        self._scope = scope
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
        reasons = "; ".join([*(refusal.message for refusal in refusals), *avoided])
        full = [refusal for refusal in refusals if isinstance(refusal, ResourceExhaustedError)]
        if full:
            delay = min(refusal.retry_after_seconds for refusal in full)
            return ResourceExhaustedError(f"no decode worker has room: {reasons}", delay)
        failures = [refusal for refusal in refusals if isinstance(refusal, InternalError | DataLossError)]
        if failures:
            return failures[-1]
        if all(isinstance(refusal, FailedPreconditionError) for refusal in refusals):
            return FailedPreconditionError(f"no decode worker can serve this: {reasons}")
        all_away = all(isinstance(refusal, UnavailableError) for refusal in refusals)
        problem = "can be reached; start one or name it with --decode" if all_away else "that fits can be reached"
        return UnavailableError(f"no decode worker {problem}: {reasons}")

    def _last_resort(self) -> DecodeWorker | None:
        """Return an ejected worker where no other could ever serve the request: one that is full may do so later."""
        if any(isinstance(refusal, ResourceExhaustedError) for refusal in self._refusals.values()):
            return None
        return next((one for one in self._pool.ejected if one.accepting and one not in self._asked), None)

    def _untried(self) -> DecodeWorker | None:
        """Return the best worker that was never asked, even if it seems to take no requests: that may be old news."""
        return next((worker for worker in self._pool.ranked(self._needs_basis) if worker not in self._asked), None)

    def _ready(self) -> DecodeWorker | None:
        """Return the best worker that takes requests and was not asked since it began to take them."""
        candidates = (worker for worker in self._pool.ranked(self._needs_basis) if worker.accepting)
        return next((worker for worker in candidates if worker.epoch != self._asked.get(worker)), None)
