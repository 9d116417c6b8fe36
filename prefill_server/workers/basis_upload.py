"""Sends a decode worker the codec's basis: once, however many requests find it missing at the same time."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
from prometheus_client import Counter

from spectrumkv.common.errors import CancelledError, ResourceExhaustedError
from spectrumkv.common.kv.codecs.spectral.basis import SpectralBasis
from spectrumkv.common.rpc.decode_methods import begin_basis
from spectrumkv.common.rpc.scope import RpcScope
from spectrumkv.common.rpc.status import error_from_rpc
from spectrumkv.common.service.config import Address

logger = logging.getLogger(__name__)


class BasisUpload:
    """Sends bases to one decode worker, one after another.

    Args:
        worker: its address.
        channel: to it.
        sent_bytes: counts what was serialized.

    Attributes:
        count: how many bases were delivered.
    """

    def __init__(self, worker: Address, channel: grpc.Channel, sent_bytes: Counter) -> None:
        self.count = 0
        self._worker = worker
        self._channel = channel
        self._sent_bytes = sent_bytes
        self._changed = threading.Condition()
        self._busy = False

    def deliver(self, basis: SpectralBasis, since: int, scope: RpcScope) -> None:
        """Send the basis, unless one was delivered since the worker said that it lacks the basis.

        Args:
            basis: of the model.
            since: `count`, as it was before the worker was asked.
            scope: the client's RPC that waits for the upload. When the RPC ends, so does its upload, and the next
                request that waits begins its own.

        Raises:
            SpectrumKVError: the worker refused the basis, or was lost (the message names the worker); or the request
                ended.
        """
        with self._turn(scope):
            if self.count == since:
                while (busy := self._send(basis, scope)) is not None:
                    # Other services send bases at present; the worker may have room for requests all the same.
                    scope.wait_for_end(busy.retry_after_seconds)
                    scope.check()
                self.count += 1

    @contextmanager
    def _turn(self, scope: RpcScope) -> Iterator[None]:
        scope.on_end(self._wake)
        with self._changed:
            self._changed.wait_for(lambda: scope.ended or not self._busy)
            scope.check()
            self._busy = True
        try:
            yield
        finally:
            with self._changed:
                self._busy = False
                self._changed.notify_all()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _send(self, basis: SpectralBasis, scope: RpcScope) -> ResourceExhaustedError | None:
        """Send the basis once.

        Returns:
            The refusal of a worker that takes no further upload at present; None where the basis arrived.

        Raises:
            CancelledError: the request ended.
            SpectrumKVError: the worker refused the basis for good, or was lost.
        """
        upload, sent = begin_basis(self._channel, basis, scope.seconds_remaining)
        scope.on_end(upload.cancel)
        try:
            upload.result()
        except grpc.FutureCancelledError:
            scope.check()
            raise CancelledError("the request ended while the codec's basis was sent") from None
        except grpc.RpcError as error:
            scope.check()
            refusal = error_from_rpc(error)
            if isinstance(refusal, ResourceExhaustedError):
                return refusal
            refusal.args = (f"decode worker {self._worker}: {refusal.message}",)
            raise refusal from error
        self._sent_bytes.inc(sent)
        logger.info("decode worker %s got the codec's basis, %d bytes", self._worker, sent)
        return None
