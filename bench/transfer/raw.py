"""Bytes that are ready to leave, in the messages of the Decode stream: gRPC's own share of a transfer."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc

from spectrumkv.common.errors import InternalError
from spectrumkv.common.kv.wire import KvChunk
from spectrumkv.common.rpc.decode_stream import Request, deserialize_request, serialize_request, serialized_bytes
from spectrumkv.common.rpc.status import error_from_rpc

SERVICE_NAME = "spectrumkv.bench.RawTransferService"
METHOD = f"/{SERVICE_NAME}/Receive"
EMPTY = b""


class RawTransferServicer:
    """Copies the payloads of chunks into one buffer, unchecked.

    Args:
        message_bytes: length of the buffer.
    """

    def __init__(self, message_bytes: int) -> None:
        self._buffer = memoryview(bytearray(message_bytes))

    def Receive(self, requests: Iterator[KvChunk], context: grpc.ServicerContext) -> Iterator[bytes]:  # noqa: N802
        """Answer once when the stream is open and once when the buffer is full."""
        yield EMPTY
        filled = 0
        while filled < len(self._buffer):
            payload = next(requests).payload
            self._buffer[filled : filled + len(payload)] = payload
            filled += len(payload)
        yield EMPTY


def add_raw_transfer_servicer(servicer: RawTransferServicer, server: grpc.Server) -> None:
    """Register the servicer."""
    handler = grpc.stream_stream_rpc_method_handler(servicer.Receive, request_deserializer=deserialize_request)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, {"Receive": handler}),))


class RawSender:
    """Sends one message over and over, each time on a stream of its own.

    Args:
        channel: to a server with a `RawTransferServicer`.
        message: what to send.
        chunk_bytes: of the message in one chunk.
    """

    def __init__(self, channel: grpc.Channel, message: memoryview, chunk_bytes: int) -> None:
        self._open: Any = channel.stream_stream(METHOD, request_serializer=serialize_request)
        # No checksum: this measures bytes in messages and nothing else.
        self._chunks: list[Request] = [
            KvChunk(number, 0, (message[start : start + chunk_bytes],))
            for number, start in enumerate(range(0, len(message), chunk_bytes))
        ]

    @property
    def message_bytes(self) -> int:
        """Serialized length of all messages."""
        return sum(map(serialized_bytes, self._chunks))

    def send(self) -> float:
        """Send all chunks; return the seconds from the open stream until the receiver had all of them.

        Raises:
            SpectrumKVError: the stream broke off.
        """
        go = threading.Event()
        call = self._open(self._requests(go))
        try:
            next(call)
            started = time.perf_counter()
            go.set()
            next(call)
            taken = time.perf_counter() - started
            for _ in call:
                raise InternalError("the receiver answered more than twice")
            return taken
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error
        finally:
            go.set()
            call.cancel()

    def _requests(self, go: threading.Event) -> Iterator[Request]:
        go.wait()
        yield from self._chunks
