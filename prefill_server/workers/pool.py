"""Offers decode workers to a request, one after another, until one serves it."""

import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from spectrumkv.common.errors import BasisMissingError, DroppedError, SpectrumKVError, UnavailableError
from spectrumkv.common.kv.codecs.basis import Basis
from spectrumkv.common.rpc.attempts import pauses
from spectrumkv.common.rpc.scope import RpcScope
from spectrumkv.common.security import ChannelSecurity
from spectrumkv.common.service.config import Address
from spectrumkv.common.telemetry.metrics import Metrics
from spectrumkv.common.telemetry.request_log import current_request
from spectrumkv.prefill_server.workers.dispatch import REFUSALS, Dispatch, pass_over_reason
from spectrumkv.prefill_server.workers.names import Resolve, resolve
from spectrumkv.prefill_server.workers.retry_budget import RetryBudget
from spectrumkv.prefill_server.workers.roster import WorkerRoster
from spectrumkv.prefill_server.workers.selector import WorkerSelector
from spectrumkv.prefill_server.workers.token_pace import usual_pace
from spectrumkv.prefill_server.workers.worker import DecodeWorker

logger = logging.getLogger(__name__)

# A request whose KV another codec may write waits so long, and no longer than half of its time, for an upload of the
# codec's basis, counted from the upload's start.
BASIS_SECONDS = 2.0
# A request that makes workers fail must not go through all of them.
MOST_RERUNS = 2


class WorkerPool:
    """Offers decode workers to requests.

    Args:
        targets: addresses and names, at least one.
        security: how the channels to the workers are guarded.
        metrics: counts workers passed over and answers that arrive damaged.
        basis: what the KV is coded in; every worker gets it; None where there is none.
        resolve_seconds: between two look-ups of a name.
        on_gone: called with the address of each worker that left for good.
        look_up: finds a name's addresses.
    """

    def __init__(
        self,
        targets: Sequence[Address],
        security: ChannelSecurity,
        metrics: Metrics,
        basis: Basis | None = None,
        resolve_seconds: float = 5.0,
        on_gone: Callable[[str], None] = lambda worker: None,
        look_up: Resolve = resolve,
    ) -> None:
        self._metrics = metrics
        self._changed = threading.Condition()
        self._retry_budget = RetryBudget()
        self._turns = itertools.count()

        def make_worker(address: Address, server_name: str | None) -> DecodeWorker:
            guarded = security if server_name is None else replace(security, server_name=server_name)
            return DecodeWorker(address, guarded, metrics, self.wake, basis)

        self._roster = WorkerRoster(targets, make_worker, metrics, resolve_seconds, self.wake, on_gone, look_up)

    def start(self) -> None:
        """Begin to follow the workers, and the names that stand for workers."""
        self._roster.start()

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
        selector = WorkerSelector(self, scope, slots, needs_basis)
        scope.on_end(self.wake)
        self._retry_budget.count_request()
        reruns = 0
        doubted: list[Dispatch] = []
        current_request().begin_stage("reserve")
        while (worker := selector.next()) is not None:
            dispatch = Dispatch(worker, slots, scope)
            yield dispatch
            for pause in pauses():
                if dispatch.admitted or not isinstance(dispatch.error, DroppedError):
                    break
                self.wait(lambda: scope.ended, pause)
                scope.check()
                dispatch = Dispatch(worker, slots, scope)
                yield dispatch
            if isinstance(dispatch.error, BasisMissingError):
                patience = min(BASIS_SECONDS, scope.seconds_remaining / 2) if may_fall_back else None
                delivered = dispatch.wait_for_basis(patience)
                if delivered or (may_fall_back and isinstance(dispatch.error, BasisMissingError)):
                    dispatch = Dispatch(worker, slots, scope, lacks_basis=not delivered)
                    yield dispatch
            if dispatch.admitted:
                for refuted in doubted:
                    refuted.refuted()
                doubted = []
            if dispatch.error is None:
                return
            if dispatch.doubted:
                doubted.append(dispatch)
            self._pass_over(worker, dispatch.error, dispatch.admitted)
            selector.refused(worker, dispatch.error)
            if dispatch.admitted or not isinstance(dispatch.error, REFUSALS):
                reruns += 1
                if reruns > MOST_RERUNS or not self._retry_budget.take():
                    raise dispatch.error
        raise selector.no_worker()

    def ranked(self, slots: int, needs_basis: bool = False) -> list[DecodeWorker]:
        """Return workers: those first that take requests and have room, then the fast ones, then by their free slots.

        Equals come in turn. Ejected workers are left out, unless none is left that takes requests.

        Args:
            slots: what the request will reserve.
            needs_basis: whether those that have the codec's basis come before those that do not.
        """
        workers = self._roster.workers
        first = next(self._turns) % max(1, len(workers))
        in_turn = workers[first:] + workers[:first]
        sound = tuple(worker for worker in in_turn if not worker.breaker.ejected)
        if any(worker.accepting for worker in sound):
            in_turn = sound

        usual = usual_pace([worker.pace for worker in in_turn if worker.accepting])

        def rank(worker: DecodeWorker) -> tuple[bool, bool, bool, bool, int]:
            lacking = needs_basis and not worker.basis_upload.delivered
            free = worker.free_slots
            return not worker.accepting, lacking, free < slots, worker.pace.is_slow(usual), -free

        return sorted(in_turn, key=rank)

    @property
    def known(self) -> list[Address]:
        """Workers, and names that stand for no worker yet."""
        return [*(worker.address for worker in self._roster.workers), *(one.name for one in self._roster.unresolved)]

    @property
    def away(self) -> list[Address]:
        """Those of `known` that do not answer, or take no requests, as far as prefill knows."""
        accepting = {worker.address for worker in self._roster.workers if worker.accepting}
        return [one for one in self.known if one not in accepting]

    @property
    def unresolved(self) -> list[str]:
        """A sentence for each name that stands for no worker yet."""
        return [
            f"{one.name.host} does not resolve: {one.failure or 'no name server has answered yet'}"
            for one in self._roster.unresolved
        ]

    @property
    def ejected(self) -> list[DecodeWorker]:
        """Workers that requests avoid because they failed several in a row."""
        return [worker for worker in self._roster.workers if worker.breaker.ejected]

    @property
    def workers(self) -> tuple[DecodeWorker, ...]:
        """Those that may get requests."""
        return self._roster.workers

    @property
    def any_expected(self) -> bool:
        """Whether a worker that takes no requests yet is likely to do so soon."""
        return self._roster.any_expected

    def wait(self, until: Callable[[], bool], seconds: float) -> None:
        """Wait until something is true that may become so when a worker comes or goes."""
        with self._changed:
            self._changed.wait_for(until, seconds)

    def wake(self) -> None:
        """Let those who wait look again."""
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Close all channels, and end the threads that follow workers and names."""
        self._roster.close()

    def _pass_over(self, worker: DecodeWorker, error: SpectrumKVError, admitted: bool) -> None:
        """Count and log that a worker did not serve a request, and take in what that says of the worker."""
        what = "a request goes on to another decode worker" if admitted else "a request passes over a decode worker"
        logger.warning("%s: %s", what, error.message)
        self._metrics.decode_workers_passed_over.labels(pass_over_reason(error, admitted)).inc()
        if isinstance(error, UnavailableError):
            worker.lost(leaving=error.retry_after_seconds is not None)
        if admitted:
            current_request().begin_stage("reserve")
