"""Runs the process of either service: logging, start, waiting for a signal, draining, exit."""

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
from spectrumkv.common.security.file_metrics import show_files
from spectrumkv.common.service.config import ServerConfig
from spectrumkv.common.service.vitals import Vitals
from spectrumkv.common.service.watchdog import Watchdog
from spectrumkv.common.telemetry.log_output import count_dropped_lines, flush_log, open_log
from spectrumkv.common.telemetry.metrics import Metrics
from spectrumkv.common.telemetry.request_log import FORMATTERS

logger = logging.getLogger(__name__)

# From glibc's malloc.h.
M_ARENA_MAX = -8
# The exit status that shells report for a program that SIGINT ended.
EXIT_INTERRUPTED = 130
# The exit status of a service whose model works no more; a supervisor starts it again.
EXIT_BROKEN = 1
# How long a process may take to end once no request is left: stop its threads, send its last spans.
STOP_SECONDS = 10.0
# How long a service whose model works no more waits for its callers to get their statuses.
LAST_WORDS_SECONDS = 0.5


def set_up_logging(level: str, log_format: str = "text") -> None:
    """Log to stderr, one line for each event; nothing ever waits for whoever reads them.

    Args:
        level: the least severe level to log.
        log_format: "text" or "json".
    """
    handler = open_log()
    handler.setFormatter(FORMATTERS[log_format]())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def run(serve: Callable[[], None]) -> NoReturn:
    """Run a service until a signal stops it, and end the process.

    Args:
        serve: loads what requests need, and serves. Its `SpectrumKVError` becomes a sentence and exit status 1.
    """
    keep_one_arena()
    exit_on_error(serve)
    leave(0)


def exit_on_error(main: Callable[[], None]) -> None:
    """Run `main`, and turn its `SpectrumKVError` into a sentence and exit status 1.

    Ctrl-C while `main` runs ends the process with exit status 130.

    Args:
        main: the program.
    """
    try:
        main()
    except SpectrumKVError as error:
        sys.exit(f"error: {error.message}")
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    finally:
        # What the exit says comes after the log.
        flush_log()


def keep_one_arena() -> None:
    """Let glibc allocate all of the process's memory from one arena; with other C libraries this does nothing.

    By default glibc gives each thread an arena of its own, and keeps the memory that an arena once needed. Requests
    run on dozens of threads, so the unused memory of arenas let a service grow for hours (docs/faults.md, "Soak").
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").mallopt(M_ARENA_MAX, 1)


def leave(status: int) -> NoReturn:
    """End the process, after the functions registered with `atexit` and the last log lines.

    The libraries' own tear-down is skipped. With it, gRPC's threads aborted the process (SIGABRT, without a message)
    in one of three exits that followed a cancelled request at once.

    Args:
        status: the exit status.
    """
    atexit._run_exitfuncs()
    logging.shutdown()
    os._exit(status)


def serve_until_signalled(
    server: Server, metrics: Metrics, config: ServerConfig, stop: Callable[[], None], vitals: Vitals
) -> None:
    """Serve until a signal of `stopping_signals`, then drain; or until the model works no more, then end the process.

    While it drains, the server reports that it is not ready, and running requests finish. Requests that still run
    after `config.grace` seconds, or at a second signal, are ended. `STOP_SECONDS` later the process ends in any case.

    Where the model works no more, the server reports that it is not ready, callers get their statuses, and the
    process ends with status `EXIT_BROKEN`.

    Args:
        server: the server, with its services added.
        metrics: the metrics that Prometheus reads.
        config: the addresses and the grace period.
        stop: called when no request is left.
        vitals: say whether the model works.

    Raises:
        InvalidArgumentError: the server cannot listen on an address.
    """
    count_dropped_lines(metrics.log_lines_dropped.inc)
    port = server.bind(str(config.listen))
    show_files(config, metrics.files)
    probes = {"/live": lambda: vitals.failure is None, "/ready": lambda: server.ready}
    metrics_port = metrics.serve(config.metrics_listen, probes)
    signals, wake = _arriving_signals()
    hurried = threading.Event()
    watchdog = Watchdog(vitals, config.stuck_after)
    for told in (server.refuse, hurried.set, wake):
        vitals.on_failure(told)
    server.start()
    watchdog.start()
    logger.info(
        "serving on %s:%d, metrics on %s:%d", config.listen.host, port, config.metrics_listen.host, metrics_port
    )
    signals.recv(1)
    if vitals.failure is None:
        logger.info("draining: no new requests, running ones get %g s", config.grace)
        watchdog.end_within(config.grace + STOP_SECONDS)
        second_signal = threading.Thread(target=_hurry_at_signal, args=(signals, hurried, watchdog), daemon=True)
        second_signal.start()
        server.drain(config.grace, hurried)
        stop()
    if vitals.failure is not None:
        watchdog.end_within(STOP_SECONDS)
        server.wait_until_quiet(LAST_WORDS_SECONDS)
        leave(EXIT_BROKEN)
    logger.info("stopped")


def stopping_signals() -> tuple[signal.Signals, ...]:
    """Return the signals that stop a process in order.

    SIGHUP says that the terminal is gone; it stays ignored where it is ignored, as under nohup. Nothing is read again
    for it: a service looks at its certificates and tokens by itself.
    """
    hangs_up = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    return (signal.SIGTERM, signal.SIGINT, *((signal.SIGHUP,) if hangs_up else ()))


def _arriving_signals() -> tuple[socket.socket, Callable[[], None]]:
    """Return a socket that receives a byte for each signal to stop from now on, and what sends it one more.

    Python runs signal handlers in the main thread only, and not while that thread waits for a lock. The byte is
    written by the interpreter's C handler, which needs no thread.
    """
    arriving, written = socket.socketpair()
    written.setblocking(False)
    signal.set_wakeup_fd(written.fileno())
    for number in stopping_signals():
        signal.signal(number, lambda number, frame: None)

    def wake() -> None:
        written.send(b"\0")

    return arriving, wake


def _hurry_at_signal(signals: socket.socket, hurried: threading.Event, watchdog: Watchdog) -> None:
    signals.recv(1)
    if not hurried.is_set():
        logger.info("second signal: running requests are ended")
        watchdog.end_within(STOP_SECONDS)
        hurried.set()
