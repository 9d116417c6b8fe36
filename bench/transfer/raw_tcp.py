"""Bytes over a plain TCP connection: the yardstick of every other way to move a KV cache."""

import socket
import threading
import time
from collections.abc import Callable

from spectrumkv.common.errors import UnavailableError
from spectrumkv.common.service.config import Address

# The receiver's answer once all bytes lie in its buffer.
RECEIVED = b"\x06"
CONNECT_SECONDS = 10.0


class TcpReceiver:
    """Receives messages of one known length into one buffer, a connection at a time, on a thread of its own.

    Args:
        host: address to listen on.
        message_bytes: length of every message.

    Attributes:
        buffer: the last message.
        port: where it listens.
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
        """Fill the buffer; return whether the sender is still there."""
        filled = 0
        while filled < len(self.buffer):
            received = connection.recv_into(self.buffer[filled:])
            if not received:
                return False
            filled += received
        return True


class TcpSender:
    """Sends one message over and over; a context manager that hangs up.

    Args:
        address: of a `TcpReceiver`.
        message: what to send, of the length that the receiver expects.
    """

    def __init__(self, address: Address, message: memoryview) -> None:
        self._message = message
        self._socket = socket.create_connection((address.host, address.port), CONNECT_SECONDS)
        self._socket.settimeout(None)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self) -> float:
        """Send the message; return the seconds until the receiver had all of it.

        Raises:
            UnavailableError: the receiver is gone.
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
