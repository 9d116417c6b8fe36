"""Connections whose streams have headers and no message, as those open them who would hold all threads."""

import queue
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

import h2.config
import h2.connection
import h2.events
import h2.settings

TIMEOUT_SECONDS = 20.0


class SilentConnection:
    """An HTTP/2 connection in plaintext that opens gRPC calls and says nothing; it answers the server's pings.

    Args:
        address: "host:port" of the server.
        window: bytes that the server may send on each stream.
        source: the caller's own address; "" is the usual one.

    Attributes:
        ended: the status of each call that the server has ended, or "reset".
        answered: set once the server has begun to answer a call.
    """

    def __init__(self, address: str, window: int = 65535, source: str = "") -> None:
        host, _, port = address.rpartition(":")
        self._authority = address
        self._socket = socket.create_connection((host, int(port)), TIMEOUT_SECONDS, (source, 0))
        self._http = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
        self._lock = threading.Lock()
        self._window_moved = threading.Condition(self._lock)
        self._told: set[int | None] = set()
        self._over: set[int | None] = set()
        self.ended: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.answered = threading.Event()
        with self._lock:
            self._http.initiate_connection()
            self._http.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window})
            self._socket.sendall(self._http.data_to_send())
        self._reader = threading.Thread(target=self._read, name="silent-connection", daemon=True)
        self._reader.start()

    def open(self, method: str, data: bytes = b"", ends: bool = False) -> int:
        """Open one call of a method, "/package.Service/Method".

        Args:
            method: the method.
            data: a message or a part of one; without it, no message follows the headers.
            ends: whether nothing follows `data`.

        Returns:
            The call's number.
        """
        headers = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", method),
            (":authority", self._authority),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
        ]
        with self._lock:
            stream = self._http.get_next_available_stream_id()
            self._http.send_headers(stream, headers)
            if data:
                self._http.send_data(stream, data, end_stream=ends)
            self._socket.sendall(self._http.data_to_send())
        return stream

    def feed(self, stream: int, data: bytes, patience: float = 1.0) -> int:
        """Send data on a call for as long as the server takes it.

        Args:
            stream: the call's number.
            data: what is sent.
            patience: seconds for which the server may take nothing.

        Returns:
            How many bytes were sent: fewer than there are where the server ended the call, or took no more.
        """
        sent = 0
        while sent < len(data):
            with self._window_moved:
                if not self._window_moved.wait_for(lambda: stream in self._over or self._room(stream), patience):
                    return sent
                if stream in self._over:
                    return sent
                piece = data[sent : sent + self._room(stream)]
                self._http.send_data(stream, piece)
                self._socket.sendall(self._http.data_to_send())
            sent += len(piece)
        return sent

    def _room(self, stream: int) -> int:
        return min(int(self._http.local_flow_control_window(stream)), self._http.max_outbound_frame_size)

    @property
    def open_streams(self) -> int:
        """Streams that the server has not ended, as far as it said."""
        with self._lock:
            return int(self._http.open_outbound_streams)

    @property
    def stream_limit(self) -> int:
        """Calls that the server lets this connection have at once."""
        with self._lock:
            return int(self._http.remote_settings.max_concurrent_streams)

    @property
    def is_connected(self) -> bool:
        """Whether the server has not closed the connection."""
        return self._reader.is_alive()

    def wait_until_closed(self) -> None:
        """Wait until the server closes the connection."""
        self._reader.join(TIMEOUT_SECONDS)
        assert not self.is_connected, "the server keeps the connection"

    def close(self) -> None:
        """Close the connection, and with it its calls."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._reader.join()
        self._socket.close()

    def _read(self) -> None:
        while True:
            try:
                data = self._socket.recv(1 << 16)
            except TimeoutError:
                continue
            except OSError:
                return
            if not data:
                return
            with self._lock, suppress(OSError):
                for event in self._http.receive_data(data):
                    self._take(event)
                self._window_moved.notify_all()
                self._socket.sendall(self._http.data_to_send())

    def _take(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.StreamReset | h2.events.StreamEnded):
            self._over.add(event.stream_id)
        if isinstance(event, h2.events.StreamReset):
            # A stream whose trailers came is reset too, since its caller has not closed its half.
            if event.stream_id not in self._told:
                self.ended.put("reset")
        elif isinstance(event, h2.events.TrailersReceived | h2.events.ResponseReceived):
            self.answered.set()
            status = dict(event.headers or ()).get(b"grpc-status")
            if status is not None:
                self._told.add(event.stream_id)
                self.ended.put(status.decode())


@contextmanager
def silent_connections(
    address: str, count: int, window: int = 65535, source: str = ""
) -> Iterator[Sequence[SilentConnection]]:
    """Hold so many connections."""
    with ExitStack() as held:
        connections = []
        for _ in range(count):
            connections.append(SilentConnection(address, window, source))
            held.callback(connections[-1].close)
        yield connections


def fill(connections: Sequence[SilentConnection], methods: Sequence[str], streams: int) -> None:
    """Open silent calls until each connection has so many, the methods in turn."""
    for connection in connections:
        for number in range(streams - connection.open_streams):
            connection.open(methods[number % len(methods)])
