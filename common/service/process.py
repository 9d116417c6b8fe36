"""What both services' processes do alike: log, start, wait for a signal, drain."""

import atexit
import ctypes
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from spectrumkv.common.errors import SpectrumKVError
from spectrumkv.common.rpc.server import Server
from spectrumkv.common.service.config import ServerConfig
from spectrumkv.common.telemetry.metrics import Metrics
from spectrumkv.common.telemetry.request_log import FORMATTERS

logger = logging.getLogger(__name__)

# From glibc's malloc.h.
M_ARENA_MAX = -8
# What shells report for a program that SIGINT ended.
EXIT_INTERRUPTED = 130


def set_up_logging(level: str, log_format: str = "text") -> None:
    """Log to stderr, one line an event.

    Args:
        level: least severe messages to log.
        log_format: "text" or "json".
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(FORMATTERS[log_format]())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def run(serve: Callable[[], None]) -> NoReturn:
    """Run a service as its process: until it is told to stop, or with a sentence why it cannot.

    Args:
        serve: loads all that requests need, and serves.
    """
    keep_one_arena()
    exit_on_error(serve)
    leave()


def exit_on_error(main: Callable[[], None]) -> None:
    """Run `main`; what is wrong with the configuration or the model becomes a sentence and exit status 1.

    Ctrl-C before the service serves ends it with exit status 130.
    """
    try:
        main()
    except SpectrumKVError as error:
        sys.exit(f"error: {error.message}")
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def keep_one_arena() -> None:
    """Have glibc take all of the process's memory from one arena; elsewhere this does nothing.

    It gives each thread an arena of its own, and keeps what each of them once needed. Requests come on dozens of
    threads, so that a service grew for hours by what lay unused in arenas (docs/faults.md, "Soak").
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").mallopt(M_ARENA_MAX, 1)


def leave() -> NoReturn:
    """End the process with status 0 once what was registered for its end is done and logs are written.

    The libraries' own tear-down is left out: where a request was ended a moment ago, gRPC's threads met it and
    aborted the process in one of three ends (SIGABRT, without a word).
    """
    atexit._run_exitfuncs()
    logging.shutdown()
    os._exit(0)


def serve_until_signalled(server: Server, metrics: Metrics, config: ServerConfig, stop: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT, then drain.

    Not-ready is reported at once, running requests finish, and after `config.grace` seconds the rest are ended.
    A second signal ends them at once.

    Args:
        server: with its services added.
        metrics: served for Prometheus.
        config: addresses and grace.
        stop: called when no request is left.

    Raises:
        InvalidArgumentError: an address cannot be listened on.
    """
    port = server.bind(str(config.listen))
    metrics_port = metrics.serve(config.metrics_listen)
    signals = _arriving_signals()
    server.start()
    logger.info(
        "serving on %s:%d, metrics on %s:%d", config.listen.host, port, config.metrics_listen.host, metrics_port
    )
    signals.recv(1)
    logger.info("draining: no new requests, running ones get %g s", config.grace)
    hurried = threading.Event()
    threading.Thread(target=_hurry_at_signal, args=(signals, hurried), name="second-signal", daemon=True).start()
    server.drain(config.grace, hurried)
    stop()
    logger.info("stopped")


def _arriving_signals() -> socket.socket:
    """Return a socket that has a byte for each SIGTERM and SIGINT from now on.

    Python runs handlers in the main thread, and one that is just about to wait for a lock runs none before the lock
    is free. The byte is written by the operating system's own handler.
    """
    arriving, written = socket.socketpair()
    written.setblocking(False)
    signal.set_wakeup_fd(written.detach())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: None)
    return arriving


def _hurry_at_signal(signals: socket.socket, hurried: threading.Event) -> None:
    signals.recv(1)
    logger.info("second signal: running requests are ended")
    hurried.set()
