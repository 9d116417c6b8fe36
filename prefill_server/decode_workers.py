"""The decode workers that prefill knows, and the lease that it holds on one of them for a request."""

import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import grpc

from spectrumkv.common.config import Address
from spectrumkv.common.decode_stream import open_decode_stream, put_basis
from spectrumkv.common.errors import (
    BasisMissingError,
    CancelledError,
    DataLossError,
    FailedPreconditionError,
    ResourceExhaustedError,
    SpectrumKVError,
    UnauthenticatedError,
    UnavailableError,
)
from spectrumkv.common.kv.spectral.basis import SpectralBasis
from spectrumkv.common.metrics import BASIS, Metrics
from spectrumkv.common.rpc import RpcScope, as_known_error, error_from_rpc, open_channel
from spectrumkv.common.security import ChannelSecurity
from spectrumkv.common.trace_context import current_trace
from spectrumkv.prefill_server.decode_answers import expect_admitted, expect_nothing, tokens_and_finished
from spectrumkv.prefill_server.pipeline import KvPipeline
from spectrumkv.v1 import decode_pb2

logger = logging.getLogger(__name__)

# Admitting takes a worker milliseconds. One that is connected and does not answer at all is stuck.
ADMISSION_SECONDS = 10.0


class DecodeLease:
    """One Decode stream: slots on a decode worker, for as long as this is open.

    A context manager; leaving it ends the stream, which frees the slots.

    Args:
        worker: the worker's address.
        open_stream: starts a Decode RPC with the worker.
        pipeline: makes the messages to send.
        scope: the client's RPC; when it ends, so does the stream.
        metrics: told of answers that arrive damaged.

    Raises:
        SpectrumKVError: the worker refused, or could not be reached.
    """

    def __init__(
        self,
        worker: Address,
        open_stream: Callable[..., Any],
        pipeline: KvPipeline,
        scope: RpcScope,
        metrics: Metrics,
    ) -> None:
        self.worker = worker
        self.pipeline = pipeline
        self._scope = scope
        self._metrics = metrics
        self._call = open_stream(
            pipeline.messages(), timeout=scope.seconds_remaining, metadata=current_trace().metadata
        )
        self._call.add_done_callback(lambda _: pipeline.cancel())
        scope.on_end(self._call.cancel)
        with self._closed_on_error(), self._errors_named(), self._admission_clock():
            expect_admitted(self._call)

    def responses(self) -> Iterator[decode_pb2.DecodeResponse]:
        """Yield what decode answers to End: tokens, then Finished; nothing where the first token was the last.

        Raises:
            DataLossError: an answer is damaged, missing or out of order.
            SpectrumKVError: the stream failed; the message names the worker.
        """
        first = self.pipeline.first_token
        with self._errors_named():
            if first is not None and first.finished:
                expect_nothing(self._call)
            else:
                yield from tokens_and_finished(self._call)

    def on_end(self, callback: Callable[[], object]) -> None:
        """Call `callback` once the stream is over, from a thread that it must not block."""
        self._call.add_done_callback(lambda _: callback())

    def failure(self) -> SpectrumKVError | None:
        """Why the stream is over before the model's pass, if it is."""
        if self._call.is_active():
            return None
        if self._call.code() is grpc.StatusCode.OK:
            return self._named(DataLossError("it ended the stream before End", "sequence"))
        return self._error(self._call)

    def __enter__(self) -> "DecodeLease":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call.cancel()
        self.pipeline.cancel()

    @contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._call.cancel()
            raise

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        """Turn what goes wrong with the stream into an error that names the worker."""
        try:
            yield
        except grpc.RpcError as error:
            raise self._error(error) from error
        except DataLossError as error:
            self._metrics.chunks_rejected.labels(error.reason).inc()
            raise self._named(error) from error

    @contextmanager
    def _admission_clock(self) -> Iterator[None]:
        """End the stream of a worker that does not answer."""
        clock = threading.Timer(ADMISSION_SECONDS, self._call.cancel)
        clock.daemon = True
        clock.start()
        try:
            yield
        finally:
            clock.cancel()

    def _error(self, error: grpc.RpcError) -> SpectrumKVError:
        self._scope.check()
        if self.pipeline.failure is not None:
            return as_known_error(self.pipeline.failure)
        known = error_from_rpc(error)
        if isinstance(known, CancelledError):
            # Not by us, or the scope would have said so: a worker that stops ends its streams like this, and so
            # does the clock above.
            known = UnavailableError("it did not answer or ended the stream")
        if isinstance(known, UnauthenticatedError):
            # The client has no part in the token that prefill sends.
            known = FailedPreconditionError(f"it refuses prefill: {known.message}")
        return self._named(known)

    def _named(self, error: SpectrumKVError) -> SpectrumKVError:
        error.args = (f"decode worker {self.worker}: {error.message}",)
        return error


class DecodeWorkers:
    """The decode workers that requests can go to; each next request starts with the next worker.

    Args:
        addresses: at least one.
        security: how the channels to them are guarded.
        metrics: told of answers that arrive damaged.
        basis: what the KV is coded in; a worker that lacks it gets it.
    """

    def __init__(
        self,
        addresses: Sequence[Address],
        security: ChannelSecurity,
        metrics: Metrics,
        basis: SpectralBasis | None = None,
    ) -> None:
        self._metrics = metrics
        self._basis = basis
        self._workers = [(address, open_channel(str(address), security)) for address in addresses]
        self._turns = itertools.cycle(range(len(self._workers)))
        self._lock = threading.Lock()

    def lease(self, make_pipeline: Callable[[], KvPipeline], scope: RpcScope) -> DecodeLease:
        """Return a lease from the first worker that admits the request.

        Args:
            make_pipeline: makes a fresh pipeline for each worker tried.
            scope: the client's RPC.

        Raises:
            ResourceExhaustedError: a worker that could serve the request is full; the delay is the shortest named.
            UnavailableError: a worker cannot be reached, and no other one could ever serve it.
            FailedPreconditionError: no worker could ever serve it.
            SpectrumKVError: the request itself is at fault, or ended.
        """
        refusals: list[SpectrumKVError] = []
        for worker, channel in self._in_turn():
            try:
                return self._lease_from(worker, channel, make_pipeline, scope)
            except (ResourceExhaustedError, UnavailableError, FailedPreconditionError) as refusal:
                logger.warning("passed over: %s", refusal.message)
                refusals.append(refusal)
        raise _no_worker(refusals)

    def close(self) -> None:
        """Close all channels."""
        for _, channel in self._workers:
            channel.close()

    def _lease_from(
        self, worker: Address, channel: grpc.Channel, make_pipeline: Callable[[], KvPipeline], scope: RpcScope
    ) -> DecodeLease:
        """Return a lease from one worker, which is sent the codec's basis if it lacks that."""
        open_stream = open_decode_stream(channel)
        try:
            return DecodeLease(worker, open_stream, make_pipeline(), scope, self._metrics)
        except BasisMissingError:
            if self._basis is None:
                raise
        self._put_basis(worker, channel, self._basis, scope)
        return DecodeLease(worker, open_stream, make_pipeline(), scope, self._metrics)

    def _put_basis(self, worker: Address, channel: grpc.Channel, basis: SpectralBasis, scope: RpcScope) -> None:
        try:
            sent = put_basis(channel, basis, scope.seconds_remaining)
        except grpc.RpcError as error:
            scope.check()
            refusal = error_from_rpc(error)
            refusal.args = (f"decode worker {worker}: {refusal.message}",)
            raise refusal from error
        self._metrics.kv_bytes_sent.labels(BASIS).inc(sent)
        logger.info("decode worker %s got the codec's basis, %d bytes", worker, sent)

    def _in_turn(self) -> list[tuple[Address, grpc.Channel]]:
        with self._lock:
            first = next(self._turns)
        return self._workers[first:] + self._workers[:first]


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
