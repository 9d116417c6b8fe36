"""A TCP proxy between the two services that counts what passes."""

import contextlib
import socket
import threading
from collections.abc import Iterator


class CountingProxy:
    """Forwards connections to `target` and counts the bytes that clients send to it."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._sent = 0
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    @property
    def bytes_to_target(self) -> int:
        """Bytes that went towards the target so far."""
        with self._lock:
            return self._sent

    def close(self) -> None:
        """Cut everything."""
        # Wakes the thread, which would else accept one more client on a listener that is closed.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listener.close()
        with self._lock:
            for one in self._sockets:
                one.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                try:
                    target = socket.create_connection(("127.0.0.1", self._target_port))
                except OSError:
                    client.close()
                    raise
                with self._lock:
                    self._sockets += [client, target]
                threading.Thread(target=self._pump, args=(client, target, True), daemon=True).start()
                threading.Thread(target=self._pump, args=(target, client, False), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if counted:
                    with self._lock:
                        self._sent += len(data)
                sink.sendall(data)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def counting_proxy(target_port: int) -> Iterator[CountingProxy]:
    proxy = CountingProxy(target_port)
    try:
        yield proxy
    finally:
        proxy.close()
