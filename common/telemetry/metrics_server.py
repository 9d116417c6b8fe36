"""Answers Prometheus and probes; whoever else comes can take neither threads nor files from the service."""

import logging
import socket
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.service.config import Address
from spectrumkv.common.service.spare_file import SpareFile

logger = logging.getLogger(__name__)

# Questions by their paths, such as "/ready".
Probes = Mapping[str, Callable[[], bool]]
NO_PROBES: Probes = {}

# Prometheus has one connection, an operator's browser a few; each holds a thread.
CONNECTIONS = 16
# How long a connection may send nothing of its request, or take nothing of the answer.
SILENCE_SECONDS = 10.0
# Why a connection was closed, as the metrics name it.
TOO_MANY, SILENT = "metrics", "metrics_silent"

CountClosed = Callable[[str], None]


class _Handler(WSGIRequestHandler):
    def setup(self) -> None:
        self.request.settimeout(SILENCE_SECONDS)
        super().setup()

    def log_message(self, *arguments: Any) -> None:
        """Log nothing: a scrape every few seconds is no news."""


class _Server(ThreadingMixIn, WSGIServer):
    """Has a thread for each connection, and closes the oldest connection where there are too many.

    A scrape takes milliseconds, so that the oldest one is not an honest caller's.
    """

    daemon_threads = True
    # Set by `serve_metrics`.
    count_closed: CountClosed
    request_queue_size = CONNECTIONS

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[Any, None] = OrderedDict()
        self._spare = SpareFile()
        super().__init__(*arguments, **named)

    def get_request(self) -> Any:
        """Take the next connection; where no file is left for it, close it.

        Returns:
            The connection, and its peer's address.
        """
        return self._spare.accept(self.socket.accept)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a connection on a thread of its own."""
        with self._lock:
            if len(self._open) >= CONNECTIONS:
                oldest, _ = self._open.popitem(last=False)
                # Its thread wakes, and closes it.
                _hang_up(oldest)
                self.count_closed(TOO_MANY)
            self._open[request] = None
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection."""
        with self._lock:
            self._open.pop(request, None)
            super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log an error, unless it is that the caller went away or said nothing."""
        error = sys.exception()
        if isinstance(error, TimeoutError):
            self.count_closed(SILENT)
        if not isinstance(error, OSError):
            logger.error("a request for metrics failed", exc_info=error)


def _hang_up(connection: Any) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        # It is closed already.
        return


def serve_metrics(
    registry: CollectorRegistry, address: Address, count_closed: CountClosed, probes: Probes = NO_PROBES
) -> int:
    """Answer Prometheus and probes on threads of their own, for as long as the process lives.

    Args:
        registry: the metrics.
        address: the address to listen on; port 0 is any free port.
        count_closed: called for each connection that is closed, with `TOO_MANY` or `SILENT`.
        probes: by their paths, the questions that are answered with yes (200) or no (503).

    Returns:
        The port.

    Raises:
        InvalidArgumentError: the address cannot be bound.
    """
    try:
        family, host = _resolved(address)
        server_class = type(
            "_FamilyServer", (_Server,), {"address_family": family, "count_closed": staticmethod(count_closed)}
        )
        server: WSGIServer = make_server(host, address.port, _application(registry, probes), server_class, _Handler)
    except OSError as error:
        raise InvalidArgumentError(
            f"cannot serve metrics on {address}: {error.strerror}; is another server using the port?"
        ) from error
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return int(server.server_port)


def _application(registry: CollectorRegistry, probes: Probes) -> Callable[..., Iterable[bytes]]:
    """Return the WSGI application: probes at their paths, metrics at every other one."""
    metrics = make_wsgi_app(registry)

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        probe = probes.get(environ.get("PATH_INFO", ""))
        if probe is None:
            answered: Iterable[bytes] = metrics(environ, start_response)
            return answered
        status, text = ("200 OK", b"yes\n") if probe() else ("503 Service Unavailable", b"no\n")
        start_response(status, [("Content-Type", "text/plain"), ("Content-Length", str(len(text)))])
        return [text]

    return answer


def _resolved(address: Address) -> tuple[socket.AddressFamily, str]:
    """Return the address's family, and its host as a number."""
    found = socket.getaddrinfo(
        address.host.strip("[]"), address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    family, _, _, _, name = found[0]
    return family, str(name[0])
