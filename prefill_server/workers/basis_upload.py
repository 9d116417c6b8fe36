"""Sends a decode worker the codec's basis on a thread of its own, so that no request's deadline bounds an upload."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
from prometheus_client import Counter

from spectrumkv.common.errors import (
    BasisMissingError,
    CancelledError,
    DataLossError,
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    ResourceExhaustedError,
    SpectrumKVError,
    UnavailableError,
)
from spectrumkv.common.kv.codecs.basis import Basis
from spectrumkv.common.rpc.decode_methods import ask_for_basis, begin_basis
from spectrumkv.common.rpc.scope import RpcScope
from spectrumkv.common.rpc.status import error_from_rpc
from spectrumkv.common.service.config import Address

logger = logging.getLogger(__name__)

# A decode worker gives an upload no longer than this either.
UPLOAD_SECONDS = 120.0
QUESTION_SECONDS = 10.0
# How a worker says that it lacks the basis; one of an older release takes the question for an empty upload.
_LACKS_IT = (BasisMissingError, DataLossError)
# The worker or the way to it failed, and the basis may arrive the next time.
_TRANSIENT = (UnavailableError, DeadlineExceededError, CancelledError, DataLossError, InternalError)


class BasisUpload:
    """Sees to it that one decode worker has the model's basis.

    Once started, a thread asks the worker whether it has the basis, and sends the basis where it has not: each time
    that the worker begins to take requests, and each time that a request finds the basis missing.

    Args:
        worker: its address.
        channel: to it.
        basis: of the model; None where there is none, and nothing is sent.
        sent_bytes: counts what was serialized.

    Attributes:
        count: how often the worker was found to have the basis, or got it.
    """

    def __init__(self, worker: Address, channel: grpc.Channel, basis: Basis | None, sent_bytes: Counter) -> None:
        self.count = 0
        self._worker = worker
        self._channel = channel
        self._basis = basis
        self._sent_bytes = sent_bytes
        self._changed = threading.Condition()
        self._asked = self._answered = 0
        self._asked_at = time.monotonic()
        self._lacking = basis is not None
        self._failures = 0
        self._failure: SpectrumKVError | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._deliver, name=f"basis-{worker}", daemon=True)

    def start(self) -> None:
        """Start the thread, where there is a basis to send."""
        if self._basis is not None:
            self._thread.start()

    @property
    def delivered(self) -> bool:
        """Whether the worker has the basis, as far as prefill knows."""
        return not self._lacking

    def request(self) -> None:
        """Have the thread look whether the worker has the basis, and send it if not."""
        with self._changed:
            if self._asked == self._answered:
                self._asked_at = time.monotonic()
            self._asked += 1
            self._changed.notify_all()

    def wait(self, since: int, scope: RpcScope, patience: float | None) -> bool:
        """Wait until the worker has the basis, which it said that it lacks.

        Args:
            since: `count`, as it was before the worker was asked.
            scope: the client's RPC.
            patience: seconds that the upload may have taken when the wait ends; None to wait as long as the client.

        Returns:
            Whether the worker has the basis now.

        Raises:
            UnavailableError: the upload failed; the message names the worker.
            FailedPreconditionError: the worker refused the basis for good.
            SpectrumKVError: the request ended.
        """
        if self._basis is None:
            return False
        scope.on_end(self._wake)
        with self._changed:
            failures = self._failures
            if self.count == since:
                self._lacking = True
                if self._asked == self._answered:
                    self.request()
            seconds = None if patience is None else max(0.0, patience - (time.monotonic() - self._asked_at))
            self._changed.wait_for(
                lambda: self.count != since or self._failures != failures or scope.ended or self._closed, seconds
            )
            scope.check()
            if self.count == since and self._failures != failures and self._failure is not None:
                raise type(self._failure)(self._failure.message)
            return self.count != since

    def close(self) -> None:
        """End the thread; call this after the channel was closed, which ends an upload that is under way."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _deliver(self) -> None:
        """Work on what was requested, until the worker is given up."""
        assert self._basis is not None
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._asked != self._answered)
                if self._closed:
                    return
                asked = self._asked
            try:
                if not self._has(self._basis):
                    self._send(self._basis)
                failure = None
            except ResourceExhaustedError as busy:
                # Other services send bases at present; the worker may have room for requests all the same.
                with self._changed:
                    self._changed.wait_for(lambda: self._closed, busy.retry_after_seconds)
                continue
            except SpectrumKVError as error:
                failure = self._named(error)
            with self._changed:
                self._answered = asked
                self._failure = failure
                self._failures += failure is not None
                self._lacking = failure is not None
                self.count += failure is None
                self._changed.notify_all()
                if failure is not None and not self._closed:
                    logger.warning("%s", failure.message)

    def _has(self, basis: Basis) -> bool:
        """Return whether the worker says that it has the basis.

        Raises:
            SpectrumKVError: the worker cannot be reached, or does not take bases.
        """
        try:
            with _rpc_errors():
                ask_for_basis(self._channel, basis, QUESTION_SECONDS).result()
        except _LACKS_IT:
            with self._changed:
                self._lacking = True
            return False
        return True

    def _send(self, basis: Basis) -> None:
        """Send the basis once.

        Raises:
            SpectrumKVError: the worker has no room for an upload, refused the basis, or was lost.
        """
        with _rpc_errors():
            upload, sent = begin_basis(self._channel, basis, UPLOAD_SECONDS)
            upload.result()
        self._sent_bytes.inc(sent)
        logger.info("decode worker %s got the codec's basis, %d bytes", self._worker, sent)

    def _named(self, error: SpectrumKVError) -> UnavailableError | FailedPreconditionError:
        """Return what a failed upload means to requests: that the worker is away, or that it does not fit."""
        sentence = f"decode worker {self._worker} did not take the codec's basis: {error.message}"
        return UnavailableError(sentence) if isinstance(error, _TRANSIENT) else FailedPreconditionError(sentence)


@contextmanager
def _rpc_errors() -> Iterator[None]:
    """Turn what gRPC raises into errors of ours.

    Raises:
        CancelledError: the channel was closed.
    """
    try:
        yield
    except grpc.RpcError as error:
        known = error_from_rpc(error)
        raise known from error
    except (ValueError, grpc.FutureCancelledError) as error:
        # gRPC raises these for a call on a channel that another thread has closed.
        raise CancelledError("the channel was closed") from error
