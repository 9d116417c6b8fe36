"""Serves until a signal comes or the service works no more: draining, last words, and an end that is bounded."""

import logging
import signal
import socket
import threading
from collections.abc import Callable

from spectrumkv.common.liveness.vitals import Vitals
from spectrumkv.common.liveness.watchdog import Watchdog
from spectrumkv.common.rpc.server import Server
from spectrumkv.common.security.file_metrics import show_files
from spectrumkv.common.service.config import ServerConfig
from spectrumkv.common.service.process import leave, stopping_signals
from spectrumkv.common.telemetry.log_output import count_dropped_lines
from spectrumkv.common.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)

# The exit status of a service whose model works no more; a supervisor starts it again.
EXIT_BROKEN = 1
# How long a process may take to end once no request is left: stop its threads, send its last spans.
STOP_SECONDS = 10.0
# How long a service whose model works no more waits for its callers to get their statuses.
LAST_WORDS_SECONDS = 0.5


def serve_until_signalled(
    server: Server, metrics: Metrics, config: ServerConfig, stop: Callable[[], None], vitals: Vitals
) -> None:
    """Serve until a signal of `stopping_signals`, then drain; or until the service works no more, then end.

    While it drains, the server reports that it is not ready, and running requests finish. Requests that still run
    after `config.grace` seconds, or at a second signal, are ended. `STOP_SECONDS` later the process ends in any case.

    Where it works no more, the server reports that it is not ready, callers get their statuses, and the
    process ends with status `EXIT_BROKEN`.

    Args:
        server: the server, with its services added.
        metrics: the metrics that Prometheus reads.
        config: the addresses and the grace period.
        stop: called when no request is left.
        vitals: say whether the service works.

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
    for told in (server.refuse, hurried.set, wake, lambda: watchdog.end_within(STOP_SECONDS)):
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
        # What hangs would not stop.
        if vitals.failure is None:
            stop()
    if vitals.failure is not None:
        server.wait_until_quiet(LAST_WORDS_SECONDS)
        leave(EXIT_BROKEN)
    logger.info("stopped")


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
