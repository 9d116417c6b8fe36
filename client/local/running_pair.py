"""Start both services, and keep them running for as long as a `with` block runs."""

import atexit
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from queue import SimpleQueue

from spectrumkv.client.client import SpectrumClient
from spectrumkv.client.local.pair_config import FREE_PORTS, Options, plan_launches
from spectrumkv.client.local.service_process import ServiceLaunch, ServiceProcess
from spectrumkv.common.errors import SpectrumKVError
from spectrumkv.common.security import ChannelSecurity
from spectrumkv.common.telemetry.log_output import STDERR, LineOutput

# The first start may convert the embedded model, and calibrates and probes it; nothing is downloaded.
READY_TIMEOUT_SECONDS = 600.0

# Called from another thread with a service's name and a line of its log.
LogSink = Callable[[str, str], None]


@dataclass(frozen=True)
class _Ended:
    """Report that a service's process has ended."""

    service: ServiceProcess


@dataclass(frozen=True)
class _Ready:
    """Report that a service is ready, or that the wait for it failed."""

    error: SpectrumKVError | None


@dataclass(frozen=True)
class _Signalled:
    """Report that a signal arrived, whose handler runs as soon as the main thread does."""


_Event = _Ended | _Ready | _Signalled


class RunningPair:
    """Hold two services that are ready.

    Args:
        decode: how the decode service was started.
        prefill: how the prefill service was started.
        events: reports the end of either process.
    """

    def __init__(self, decode: ServiceLaunch, prefill: ServiceLaunch, events: "SimpleQueue[_Event]") -> None:
        self.decode = decode
        self.prefill = prefill
        self._events = events

    @property
    def address(self) -> str:
        """Return the address that clients connect to: prefill's "host:port"."""
        return str(self.prefill.address)

    @property
    def security(self) -> ChannelSecurity:
        """Return how clients talk to the prefill service."""
        return self.prefill.security

    def report_end(self, service: ServiceProcess) -> None:
        """Report that a process which serves beside the pair has ended; `wait_for_death` then raises."""
        self._events.put(_Ended(service))

    def wait_for_death(self) -> None:
        """Block until one of the services ends.

        Raises:
            UnavailableError: a service ended; the message names it and quotes its last log lines.
        """
        while True:
            event = self._events.get()
            if isinstance(event, _Ended):
                raise event.service.death()


def log_on_stderr() -> LogSink:
    """Return what writes a service's log line to stderr, marked with the service's name, and never waits."""
    output = LineOutput(STDERR)
    atexit.register(output.flush)
    return lambda name, line: output.write_line(f"{name:>7} | {line}")


@contextmanager
def running_pair(
    options: Options = FREE_PORTS,
    on_line: LogSink = lambda name, line: None,
    ready_timeout: float = READY_TIMEOUT_SECONDS,
) -> Iterator[RunningPair]:
    """Start decode and prefill, wait until both are ready, and stop them at the end of the block.

    Args:
        options: options of both services by name, as text (see `PairConfig`).
        on_line: called with each line that a service logs.
        ready_timeout: seconds until both services must be ready.

    Yields:
        The running pair.

    Raises:
        InvalidArgumentError: an option is unknown, or its value is not allowed.
        UnavailableError: a service ended before it was ready.
        DeadlineExceededError: a service was not ready in time.
    """
    with running_services(*plan_launches(options), on_line, ready_timeout) as pair:
        yield pair


@contextmanager
def running_services(
    decode: ServiceLaunch, prefill: ServiceLaunch, on_line: LogSink, ready_timeout: float
) -> Iterator[RunningPair]:
    """Yield two services that are started by their commands; see `running_pair`. Prefill stops before decode."""
    events: SimpleQueue[_Event] = SimpleQueue()
    with _woken_by_signals(events), ExitStack() as running:
        for launch in (decode, prefill):
            running.enter_context(_started(launch, on_line, events))
        with ExitStack() as watching:
            for launch in (decode, prefill):
                watching.enter_context(_watched(launch, ready_timeout, events))
            _wait_for_both(events)
        yield RunningPair(decode, prefill, events)


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise KeyboardInterrupt in the main thread during this block, as Ctrl-C does.

    SIGHUP says that the terminal is gone. It stays ignored where it is ignored, as under nohup.
    """
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in previous.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _woken_by_signals(events: "SimpleQueue[_Event]") -> Iterator[None]:
    """Report each signal that Python handles as an event.

    Python runs a signal's handler in the main thread. If that thread is about to wait for an event, the handler would
    run only after the event. The interpreter therefore writes each signal to a socket at once, and another thread
    reads the socket.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arriving, written = socket.socketpair()
    written.setblocking(False)

    def report() -> None:
        while arriving.recv(64):
            events.put(_Signalled())

    thread = threading.Thread(target=report, name="signals", daemon=True)
    thread.start()
    previous = signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        written.close()
        thread.join()
        arriving.close()


@contextmanager
def _started(launch: ServiceLaunch, on_line: LogSink, events: "SimpleQueue[_Event]") -> Iterator[ServiceProcess]:
    service = ServiceProcess(
        launch,
        on_line=lambda line: on_line(launch.name, line),
        on_exit=lambda ended: events.put(_Ended(ended)),
    )
    try:
        yield service
    finally:
        service.stop()


@contextmanager
def _watched(launch: ServiceLaunch, timeout: float, events: "SimpleQueue[_Event]") -> Iterator[None]:
    """Report once when the service is ready; leaving the block ends the wait."""
    client = SpectrumClient(str(launch.address), launch.security)

    def wait() -> None:
        try:
            client.wait_until_serving(timeout)
        except SpectrumKVError as error:
            events.put(_Ready(error))
        else:
            events.put(_Ready(None))

    thread = threading.Thread(target=wait, name=f"{launch.name}-readiness", daemon=True)
    thread.start()
    try:
        yield
    finally:
        client.close()
        thread.join()


def _wait_for_both(events: "SimpleQueue[_Event]") -> None:
    ready = 0
    while ready < 2:
        event = events.get()
        if isinstance(event, _Ended):
            raise event.service.death()
        if isinstance(event, _Ready):
            if event.error is not None:
                raise event.error
            ready += 1
