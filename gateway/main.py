"""Run the `spectrumkv-gateway` command."""

import asyncio
import logging
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.service.command_line import asks_for_check, load
from spectrumkv.common.service.machine import max_connections
from spectrumkv.common.service.process import exit_on_error, keep_one_arena, set_up_logging, stopping_signals
from spectrumkv.common.service.spare_file import SparedListener
from spectrumkv.common.telemetry.log_output import count_dropped_lines
from spectrumkv.gateway.app import make_app
from spectrumkv.gateway.config import GatewayConfig
from spectrumkv.gateway.http.connection import IDLE_SECONDS, BoundedConnection
from spectrumkv.gateway.http.exchange import LAST_WORDS_SECONDS, App
from spectrumkv.gateway.http.heads import MAX_HEAD_BYTES
from spectrumkv.gateway.http.tls import TlsConnection, watched_context
from spectrumkv.gateway.metrics import GatewayMetrics

logger = logging.getLogger(__name__)

PROGRAM = "spectrumkv-gateway"
# Connections that the system may hold until the gateway takes them, all at once.
MAX_BACKLOG = 1024


def main() -> None:
    """Serve HTTP until a signal stops it. With --check-config, say what would be served."""
    keep_one_arena()
    exit_on_error(_check if asks_for_check(sys.argv[1:]) else _serve)


def _check() -> None:
    config = load(GatewayConfig, sys.argv[1:], PROGRAM)
    config.security().check()
    server_config(make_app(config, GatewayMetrics.for_process()), config)
    tokens = "checked here" if config.checks_tokens else "passed on to prefill"
    sys.stdout.write(
        f"listens  {config.listen}, {'TLS' if config.tls_cert else 'plaintext'}\n"
        f"prefill  {config.target}, {'TLS' if config.prefill_tls_ca else 'plaintext'}\n"
        f"tokens   {tokens}\n"
    )


def _serve() -> None:
    config = load(GatewayConfig, sys.argv[1:], PROGRAM)
    set_up_logging(config.log_level, config.log_format)
    metrics = GatewayMetrics.for_process()
    count_dropped_lines(metrics.log_lines_dropped.inc)
    server = GatewayServer(server_config(make_app(config, metrics), config))
    metrics.connections.set_function(lambda: len(server.server_state.connections))
    with listening(config) as listener:
        host, port = config.listen.host, listener.getsockname()[1]
        logger.info("serving HTTP on %s:%d, prefill is %s", host, port, config.target)
        server.run([listener])
    logger.info("stopped")


class GatewayServer(uvicorn.Server):
    """Serve until a signal of `stopping_signals`; a second one ends running requests."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle the signals while the server runs. uvicorn's own handler raises them again at the end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handled = {number: signal.getsignal(number) for number in stopping_signals()}
        for number in handled:
            signal.signal(number, lambda number, frame: self._stop())
        try:
            yield
        finally:
            for number, before in handled.items():
                signal.signal(number, before)

    def _stop(self) -> None:
        if self.should_exit:
            # The handler runs in between any two steps of the loop, or while it waits.
            asyncio.get_running_loop().call_soon_threadsafe(self._hurry)
        self.should_exit = True

    def _hurry(self) -> None:
        """End running requests: each tells its caller so, and those that read nothing are not waited for."""
        logger.info("second signal: running requests are ended")
        for task in self.server_state.tasks:
            task.cancel()
        asyncio.get_running_loop().call_later(LAST_WORDS_SECONDS, self._close_all)

    def _close_all(self) -> None:
        for one in list(self.server_state.connections):
            one.transport.abort()


@contextmanager
def listening(config: GatewayConfig) -> Iterator[socket.socket]:
    """Listen on the gateway's address while the block runs.

    Args:
        config: of the gateway.

    Yields:
        The socket.

    Raises:
        InvalidArgumentError: the address cannot be listened on.
    """
    try:
        listener = SparedListener(config.listen.listener())
    except OSError as error:
        raise InvalidArgumentError(
            f"--listen {config.listen} cannot be listened on: {error.strerror}; name another address, or stop what "
            "uses it"
        ) from error
    with listener:
        listener.listen(_backlog())
        yield listener


def server_config(app: App, config: GatewayConfig) -> uvicorn.Config:
    """Return how uvicorn serves the gateway.

    Args:
        app: the gateway.
        config: its options.

    Raises:
        InvalidArgumentError: certificate and key cannot be used.
    """
    return uvicorn.Config(
        app,
        http=_connections(config),
        ws="none",
        lifespan="on",
        # Requests are logged by the exchange, which knows more of them.
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=_backlog(),
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=int(config.grace),
    )


def _backlog() -> int:
    """Return how many connections are taken at once: files are left for those that make room for them."""
    return min(MAX_BACKLOG, max(1, max_connections() // 2))


def _connections(config: GatewayConfig) -> Any:
    """Return what makes the protocol of a new connection.

    Raises:
        InvalidArgumentError: certificate and key cannot be used.
    """
    if config.tls_cert is None or config.tls_key is None:
        return BoundedConnection
    return partial(TlsConnection, watched_context(Path(config.tls_cert), Path(config.tls_key)))
