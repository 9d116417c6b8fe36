"""One decode worker's chance at a request, and whether the request may go on to another worker after it."""

from contextlib import ExitStack
from types import TracebackType

from spectrumkv.common.errors import (
    FailedPreconditionError,
    ResourceExhaustedError,
    SpectrumKVError,
    UnavailableError,
)
from spectrumkv.common.rpc.scope import RpcScope
from spectrumkv.prefill_server.transfer.pipeline import KvPipeline
from spectrumkv.prefill_server.workers.lease import DecodeLease
from spectrumkv.prefill_server.workers.worker import DecodeWorker

# Labels of `decode_workers_passed_over`: of a worker that was lost after it admitted the request, and of refusals.
LOST = "lost"
_REASONS: dict[type[SpectrumKVError], str] = {
    ResourceExhaustedError: "full",
    UnavailableError: "unavailable",
    FailedPreconditionError: "unfit",
}
# Errors of one worker that another worker may not have.
REFUSALS = tuple(_REASONS)


def refusal_reason(refusal: SpectrumKVError) -> str:
    """Return the label of a refusal, which is one of `REFUSALS`."""
    return next(reason for kind, reason in _REASONS.items() if isinstance(refusal, kind))


class Dispatch:
    """Gives one worker its chance at a request, and records how that ended.

    A context manager. While its block runs, the request's slots count as reserved on the worker. The block ends
    without an error where the worker refuses the request, or is lost before `commit`: the request then goes on to the
    next worker.

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
        self._held = ExitStack()

    def open_lease(self, pipeline: KvPipeline) -> DecodeLease:
        """Ask the worker to admit the request.

        Args:
            pipeline: makes the messages to send; a fresh one for each dispatch.

        Returns:
            The lease, a context manager.

        Raises:
            SpectrumKVError: the worker refused the request, or could not be reached.
        """
        lease = self.worker.open_lease(pipeline, self._scope)
        self.admitted = True
        return lease

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

    def commit(self) -> None:
        """Say that the client has tokens which only this worker can continue."""
        self._committed = True

    def __enter__(self) -> "Dispatch":
        self._held.enter_context(self.worker.holding(self._slots))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._held.close()
        if isinstance(error, REFUSALS) and self._goes_on(error):
            # The frames that the error came through hold the request and its KV.
            self.error = error.with_traceback(None)
        return self.error is not None

    def _goes_on(self, error: SpectrumKVError) -> bool:
        """Return whether the request may go on to another worker after this error."""
        return not self.admitted or (isinstance(error, UnavailableError) and not self._committed)
