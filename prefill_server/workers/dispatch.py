"""One decode worker's chance at a request, and whether the request may go on to another worker after it."""

import logging
from contextlib import ExitStack
from types import TracebackType

from spectrumkv.common.errors import (
    DataLossError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    SpectrumKVError,
    UnansweredError,
    UnavailableError,
)
from spectrumkv.common.rpc.scope import RpcScope
from spectrumkv.prefill_server.transfer.pipeline import KvPipeline
from spectrumkv.prefill_server.workers.lease import DecodeLease
from spectrumkv.prefill_server.workers.worker import DecodeWorker

logger = logging.getLogger(__name__)

# Labels of `decode_workers_passed_over`: of a worker that was lost after it admitted the request, of one that failed,
# and of refusals.
LOST, FAILED = "lost", "failed"
_REASONS: dict[type[SpectrumKVError], str] = {
    ResourceExhaustedError: "full",
    UnavailableError: "unavailable",
    FailedPreconditionError: "unfit",
}
# Errors of one worker that another worker may not have.
REFUSALS = tuple(_REASONS)
# Prefill has checked the request by the same rules as decode, and a worker says that it is the caller's fault.
DOUBTED = InvalidArgumentError
# Errors that count against a worker: the last two also in place of an answer to Begin, since no request makes them.
FAILURES = (InternalError, UnavailableError, DataLossError)


def pass_over_reason(error: SpectrumKVError, admitted: bool) -> str:
    """Return the label of a worker's error.

    Args:
        error: one of `REFUSALS`, `FAILURES` or `DOUBTED`.
        admitted: whether the worker had admitted the request.
    """
    if admitted:
        return LOST if isinstance(error, UnavailableError) else FAILED
    if isinstance(error, DOUBTED):
        return "unfit"
    return next((reason for kind, reason in _REASONS.items() if isinstance(error, kind)), FAILED)


class Dispatch:
    """Gives one worker its chance at a request, and records how that ended.

    A context manager. While its block runs, the request's slots count as reserved on the worker. The block ends
    without an error where the worker refuses the request, or fails it or is lost before `commit`: the request then
    goes on to the next worker. The worker's circuit breaker learns how the dispatch ended.

    Args:
        worker: the decode worker.
        slots: what the request will reserve.
        scope: the client's RPC.
        lacks_basis: whether the worker has not received the codec's basis yet.

    Attributes:
        worker: the decode worker.
        lacks_basis: whether the KV must be coded without the codec's basis.
        admitted: whether the worker admitted the request.
        error: why the request goes on to the next worker; None where it does not.
    """

    def __init__(self, worker: DecodeWorker, slots: int, scope: RpcScope, lacks_basis: bool = False) -> None:
        self.worker = worker
        self.lacks_basis = lacks_basis
        self.admitted = False
        self.error: SpectrumKVError | None = None
        self._slots = slots
        self._scope = scope
        self._deliveries = worker.basis_upload.count
        self._committed = False
        self._trial = False
        self._lease: DecodeLease | None = None
        self._held = ExitStack()

    def open_lease(self, pipeline: KvPipeline) -> DecodeLease:
        """Ask the worker to admit the request.

        Args:
            pipeline: makes the messages to send; a fresh one for each dispatch.

        Returns:
            The lease, a context manager.

        Raises:
            SpectrumKVError: the worker refused or failed the request, or could not be reached.
        """
        self._lease = self.worker.open_lease(pipeline, self._scope)
        self._lease.wait_for_admission()
        self.admitted = True
        return self._lease

    def wait_for_basis(self, patience: float | None) -> bool:
        """Wait until the worker has the codec's basis, which it said that it lacks; slots stay held meanwhile.

        Args:
            patience: seconds that the upload may have taken when the wait ends; None to wait as long as the client.

        Returns:
            Whether the worker has the basis now, so that it can be asked again.

        Raises:
            SpectrumKVError: the request ended.
        """
        try:
            with self.worker.holding(self._slots):
                return self.worker.basis_upload.wait(self._deliveries, self._scope, patience)
        except REFUSALS as refusal:
            self.error = refusal.with_traceback(None)
            return False

    @property
    def doubted(self) -> bool:
        """Whether the worker refused the request as the caller's fault, after prefill had found none."""
        return isinstance(self.error, DOUBTED)

    def refuted(self) -> None:
        """Take in that another worker admitted what this one called the caller's fault: this counts as a failure."""
        self._count_failure()

    def commit(self) -> None:
        """Say that the client has tokens which only this worker can continue."""
        if not self._committed:
            self._committed = True
            self.worker.breaker.generated()

    def __enter__(self) -> "Dispatch":
        self._held.enter_context(self.worker.holding(self._slots))
        self._trial = self.worker.breaker.begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._held.close()
        self._judge(error)
        if isinstance(error, SpectrumKVError) and self._goes_on(error):
            # The frames that the error came through hold the request and its KV.
            self.error = error.with_traceback(None)
        return self.error is not None

    def _judge(self, error: BaseException | None) -> None:
        """Tell the worker's circuit breaker what this dispatch says of the worker."""
        breaker = self.worker.breaker
        if error is None and self._committed:
            breaker.succeeded()
        elif self._worker_failed(error):
            self._count_failure()
        elif self._trial:
            breaker.abandon_trial()

    def _count_failure(self) -> None:
        seconds = self.worker.breaker.failed()
        if seconds is not None:
            logger.warning(
                "decode worker %s failed one request after another; others take its requests for %g s",
                self.worker.address,
                seconds,
            )

    def _worker_failed(self, error: BaseException | None) -> bool:
        """Return whether the worker failed the request, or let it wait for an answer in vain.

        Errors of prefill and of the client do not count. A worker that is away has failed only what it admitted. One
        that shuts down in order says when to ask again, and does not fail.
        """
        if isinstance(error, UnansweredError):
            return True
        if not isinstance(error, FAILURES) or self._lease is None or error is not self._lease.worker_error:
            return False
        return not isinstance(error, UnavailableError) or (self.admitted and error.retry_after_seconds is None)

    def _goes_on(self, error: SpectrumKVError) -> bool:
        """Return whether the request may go on to another worker after this error."""
        if not self.admitted:
            doubted = isinstance(error, DOUBTED) and self._lease is not None and error is self._lease.worker_error
            return isinstance(error, REFUSALS) or doubted or self._worker_failed(error)
        return not self._committed and (isinstance(error, UnavailableError) or self._worker_failed(error))
