"""A TCP proxy that does to a link what networks do: it stalls at a chosen byte, swallows everything, or hangs up."""

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator

WAIT_SECONDS = 60.0
TOWARDS_SERVER, TOWARDS_CLIENT = "towards server", "towards client"


class Link:
    """Forwards connections to `target_port`; faults and gates hold for all of them, also those still to come."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self._changed = threading.Condition()
        self._passed = {TOWARDS_SERVER: 0, TOWARDS_CLIENT: 0}
        # How many bytes may have passed in a direction before the next one waits; None is no gate.
        self._gate: dict[str, int | None] = {TOWARDS_SERVER: None, TOWARDS_CLIENT: None}
        self._held = {TOWARDS_SERVER: 0, TOWARDS_CLIENT: 0}
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def lead_to(self, target_port: int) -> None:
        """Forward connections still to come to another port."""
        self._target_port = target_port

    def hold(self, direction: str, after_bytes: int = 0) -> None:
        """Let `after_bytes` more pass in a direction and keep the rest until `release`."""
        with self._changed:
            self._gate[direction] = self._passed[direction] + after_bytes

    def wait_until_held(self, direction: str) -> None:
        """Wait until the gate keeps something from passing."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._held[direction] > 0, WAIT_SECONDS), "nothing came to the gate"

    def release(self) -> None:
        """Open both gates: all that was held goes on, in order."""
        with self._changed:
            self._gate = dict.fromkeys(self._gate)
            self._changed.notify_all()

    def blackhole(self) -> None:
        """Cut the cable: nothing passes, and nobody is told."""
        for direction in self._gate:
            self.hold(direction)

    def reset(self) -> None:
        """Hang up on everybody with a TCP reset; what was held is lost, new connections work."""
        with self._changed:
            sockets, self._sockets = self._sockets, []
        for one in sockets:
            with contextlib.suppress(OSError):
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            # A thread that waits in `recv` keeps the socket open; this wakes it.
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RD)
            one.close()
        self.release()

    def close(self) -> None:
        self._listener.close()
        self.reset()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(("127.0.0.1", self._target_port))
                except OSError:
                    client.close()
                    continue
                with self._changed:
                    self._sockets += [client, server]
                for pump in ((client, server, TOWARDS_SERVER), (server, client, TOWARDS_CLIENT)):
                    threading.Thread(target=self._pump, args=pump, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, direction: str) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self._forward(sink, data, direction)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _forward(self, sink: socket.socket, data: bytes, direction: str) -> None:
        while data:
            with self._changed:
                allowed = self._wait_for_room(direction, len(data))
                self._passed[direction] += allowed
            sink.sendall(data[:allowed])
            data = data[allowed:]

    def _wait_for_room(self, direction: str, wanted: int) -> int:
        def room() -> int:
            gate = self._gate[direction]
            return wanted if gate is None else max(0, min(wanted, gate - self._passed[direction]))

        if not room():
            self._held[direction] += 1
            self._changed.notify_all()
            self._changed.wait_for(room)
            self._held[direction] -= 1
        return room()


@contextlib.contextmanager
def link_to(port: int) -> Iterator[Link]:
    link = Link(port)
    try:
        yield link
    finally:
        link.close()
