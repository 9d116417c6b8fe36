"""Send FP16 bytes as they are, over plain TCP and in the chunks of a gRPC stream: the references of `transfer`."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from spectrumkv.common.errors import InternalError, UnavailableError
from spectrumkv.common.kv.wire import KvChunk
from spectrumkv.common.rpc.decode_stream import Request, deserialize_request, serialize_request, serialized_bytes
from spectrumkv.common.rpc.status import error_from_rpc
from spectrumkv.common.service.config import Address

SERVICE_NAME = "spectrumkv.bench.RawTransferService"
METHOD = f"/{SERVICE_NAME}/Receive"
EMPTY = b""


class RawTransferServicer:
    """Copy the payloads of chunks into one buffer, unchecked.

    Args:
        message_bytes: length of the buffer.
    """

    def __init__(self, message_bytes: int) -> None:
        self._buffer = memoryview(bytearray(message_bytes))

    def Receive(self, requests: Iterator[KvChunk], context: grpc.ServicerContext) -> Iterator[bytes]:  # noqa: N802
        """Copy each chunk's bytes into the buffer; the first message opens the stream and has none.

        Yields:
            An empty message when the stream is open, and one when the buffer is full.
        """
        next(requests)
        yield EMPTY
        filled = 0
        while filled < len(self._buffer):
            payload = next(requests).payload
            self._buffer[filled : filled + len(payload)] = payload
            filled += len(payload)
        yield EMPTY


def add_raw_transfer_servicer(servicer: RawTransferServicer, server: grpc.Server) -> None:
    """Add the servicer to a server."""
    handler = grpc.stream_stream_rpc_method_handler(servicer.Receive, request_deserializer=deserialize_request)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, {"Receive": handler}),))


class RawSender:
    """Send one message repeatedly, each time on a new stream.

    Args:
        channel: the connection to a server with a `RawTransferServicer`.
        message: the bytes to send.
        chunk_bytes: bytes of the message in one chunk.
    """

    def __init__(self, channel: grpc.Channel, message: memoryview, chunk_bytes: int) -> None:
        self._open: Any = channel.stream_stream(METHOD, request_serializer=serialize_request)
        # The checksum is 0: this path measures the bytes in messages and nothing else.
        self._chunks: list[Request] = [
            KvChunk(number, 0, (message[start : start + chunk_bytes],))
            for number, start in enumerate(range(0, len(message), chunk_bytes))
        ]

    @property
    def message_bytes(self) -> int:
        """Return the serialized length of all chunks, in bytes."""
        return sum(map(serialized_bytes, self._chunks))

    def send(self) -> float:
        """Send all chunks; return the seconds from the open stream until the receiver has all of them.

        Returns:
            The seconds that the transfer took.

        Raises:
            InternalError: the receiver breaks the protocol.
            SpectrumKVError: the stream ended early.
        """  # noqa: DOC501  # the rule wants `error_from_rpc` itself; it makes a SpectrumKVError
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
        # A server lets a handler run only once its call has a message.
        yield KvChunk(0, 0, (EMPTY,))
        go.wait()
        yield from self._chunks


# The receiver answers this when all bytes are in its buffer.
RECEIVED = b"\x06"
CONNECT_SECONDS = 10.0


class TcpReceiver:
    """Receive messages of one known length into one buffer, a connection at a time, on a thread.

    Args:
        host: the address to listen on.
        message_bytes: length of every message.

    Attributes:
        buffer: the last message.
        port: the port that it listens on.
    """

    def __init__(self, host: str, message_bytes: int) -> None:
        self.buffer = memoryview(bytearray(message_bytes))
        self._listener = socket.create_server((host, 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._serve, name="tcp-receiver", daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while self._receive(connection):
                    connection.sendall(RECEIVED)

    def _receive(self, connection: socket.socket) -> bool:
        """Return whether the sender was there until the buffer was full."""
        filled = 0
        while filled < len(self.buffer):
            received = connection.recv_into(self.buffer[filled:])
            if not received:
                return False
            filled += received
        return True


class TcpSender:
    """Send one message repeatedly; a context manager that closes the connection.

    Args:
        address: the address of a `TcpReceiver`.
        message: the bytes to send, as many as the receiver expects.
    """

    def __init__(self, address: Address, message: memoryview) -> None:
        self._message = message
        self._socket = socket.create_connection((address.host, address.port), CONNECT_SECONDS)
        self._socket.settimeout(None)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self) -> float:
        """Send the message; return the seconds until the receiver has all of it.

        Returns:
            The seconds that the transfer took.

        Raises:
            UnavailableError: the receiver closed the connection.
        """
        started = time.perf_counter()
        try:
            self._socket.sendall(self._message)
            answer = self._socket.recv(1)
        except OSError as error:
            raise UnavailableError(f"the TCP receiver is gone: {error.strerror}") from error
        if answer != RECEIVED:
            raise UnavailableError("the TCP receiver hung up before it had the message")
        return time.perf_counter() - started

    def __enter__(self) -> Callable[[], float]:
        return self.send

    def __exit__(self, *exception: object) -> None:
        self._socket.close()
