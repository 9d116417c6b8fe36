"""The one place that makes gRPC servers: thread pools, limits, health, reflection, draining."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.rpc.channel import CHANNEL_OPTIONS, KEEPALIVE_SECONDS, MAX_MESSAGE_BYTES
from spectrumkv.common.rpc.interceptor import StatusInterceptor
from spectrumkv.common.rpc.limits.calls import CallLimits, question_limit, request_limit, upload_limit, watch_limit
from spectrumkv.common.rpc.limits.connections import ConnectionLimit
from spectrumkv.common.rpc.limits.first_message import FIRST_MESSAGE_SECONDS, CountSilent, SilentCalls
from spectrumkv.common.rpc.limits.stalled_readers import STALL_SECONDS, StalledReaders
from spectrumkv.common.security import ServerSecurity
from spectrumkv.common.security.callers import AllowedCallers
from spectrumkv.common.service.machine import max_connections

# How many streams may watch health or ask for reflection; each holds a thread.
WATCHERS = 32
# How many codec bases may arrive at once; a prefill worker sends one once.
UPLOADS = 4
# How many texts may be tokenized at once; each takes a core.
QUESTIONS = 4
# Threads for calls that take no place: GetServerInfo, and as many again for health checks, which must be answered
# while every other thread serves a stream.
SPARE_THREADS = 8
# How many calls may have sent headers and no whole message yet; each holds a thread for as long. Those of health,
# which need no token, can take none from the others, and are fewer.
SILENT_CALLS, SILENT_WATCHERS = 256, 16
# How many more calls may wait a moment where their connection has its share of those: a caller that begins hundreds
# at once is not silent, but the server reads one message after another.
HESITATING_CALLS, HESITATING_WATCHERS = 256, 16
# Each also holds what has come of its message. There may be fewer where messages are long, but not fewer than that:
# honest callers of a slow link need a while for a long message.
PARTIAL_MESSAGE_BYTES, FEWEST_SILENT_CALLS = 256 << 20, 32
# A question about health names a service. Its watch keeps the name for as long as it lasts.
HEALTH_REQUEST_BYTES = 1024
# How many RPCs may wait for a thread: bursts of health checks, and of requests that are about to be refused.
QUEUED_RPCS = 1024
# How many calls one connection may have beyond those for which there is a place.
EXTRA_STREAMS = 512
# A connection on which nothing has been called for so long is closed; a caller's next call opens another.
IDLE_SECONDS = 300
# For TLS and the first frames of HTTP/2; a caller that connects and sends nothing holds a socket for no longer.
HANDSHAKE_SECONDS = 10

_SERVER_OPTIONS = (
    *CHANNEL_OPTIONS,
    # Without this a second server binds the same port without an error and takes half of the requests.
    ("grpc.so_reuseport", 0),
    # Without these two the server takes the keepalive pings of its callers for an attack.
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_SECONDS * 500),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.server_handshake_timeout_ms", HANDSHAKE_SECONDS * 1000),
    ("grpc.max_connection_idle_ms", IDLE_SECONDS * 1000),
)


class Server:
    """Serves one service, with health checks, optional reflection, and errors turned into statuses.

    Args:
        add_servicer: the generated function that registers a servicer.
        servicer: serves the RPCs.
        service_name: full name of the service, as health checks and reflection know it.
        threads: how many streams are served at once; each holds a thread, and the server refuses more with
            RESOURCE_EXHAUSTED.
        count_ended: called with the status code's name at the end of every stream.
        count_silent: called for each call that ends before its first message, as `SilentCalls` does.
        count_closed: called for each connection that is closed because its address has too many.
        reflection_enabled: whether clients may ask which services and messages there are.
        security: TLS files and the tokens that callers must send.
        most_message_bytes: of a message that callers send; what no request needs, nobody may have the server keep.
        connections_per_address: how many connections an address may have; None is half of all.
        connection_seconds: after which a connection gets no new calls, so that its caller opens another one, perhaps
            to another server; calls that run on it go on. None is never.

    Raises:
        InvalidArgumentError: the accepted tokens cannot be read.
    """

    def __init__(
        self,
        add_servicer: Callable[[Any, grpc.Server], None],
        servicer: object,
        service_name: str,
        threads: int,
        count_ended: Callable[[str], None],
        count_silent: CountSilent = lambda reason: None,
        count_closed: Callable[[], None] = lambda: None,
        reflection_enabled: bool = False,
        security: ServerSecurity = ServerSecurity(),  # noqa: B008  # frozen
        most_message_bytes: int = MAX_MESSAGE_BYTES,
        connections_per_address: int | None = None,
        connection_seconds: float | None = None,
    ) -> None:
        self._service_name = service_name
        self._ready = False
        self._security = security
        self._connections_per_address = connections_per_address or max_connections() // 2
        self._count_closed = count_closed
        self._connection_limits: list[ConnectionLimit] = []
        self._requests = request_limit(threads)
        silent_calls = silent_call_limit(most_message_bytes)
        calls = threads + UPLOADS + QUESTIONS + SPARE_THREADS + silent_calls + HESITATING_CALLS
        watchers = WATCHERS + SPARE_THREADS + SILENT_WATCHERS + HESITATING_WATCHERS
        self._watcher_threads = ThreadPoolExecutor(watchers, thread_name_prefix="health")
        limits = CallLimits(
            self._requests,
            upload_limit(UPLOADS),
            question_limit(QUESTIONS),
            watch_limit(WATCHERS),
            SilentCalls(silent_calls, HESITATING_CALLS, FIRST_MESSAGE_SECONDS, count_silent),
            SilentCalls(
                SILENT_WATCHERS, HESITATING_WATCHERS, FIRST_MESSAGE_SECONDS, count_silent, HEALTH_REQUEST_BYTES
            ),
            StalledReaders(STALL_SECONDS),
            self._watcher_threads,
        )
        callers = AllowedCallers(security.client_names)
        self._server = grpc.server(
            ThreadPoolExecutor(calls, thread_name_prefix="rpc"),
            interceptors=(StatusInterceptor(limits, callers, count_ended), *security.interceptors()),
            options=_options(most_message_bytes, threads, connection_seconds),
            maximum_concurrent_rpcs=calls + watchers + QUEUED_RPCS,
        )
        # With the non-blocking `Watch`, the whole server locks up where one watcher leaves while another comes or the
        # status changes (github.com/grpc/grpc/pull/43403).
        self._health = health.HealthServicer(experimental_non_blocking=False)
        add_servicer(servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if reflection_enabled:
            names = [service_name, health.SERVICE_NAME, reflection.SERVICE_NAME]
            reflection.enable_server_reflection(names, self._server)
        self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)

    def bind(self, address: str) -> int:
        """Listen on an address.

        Args:
            address: "host:port"; port 0 lets the system choose one.

        Returns:
            The port.

        Raises:
            InvalidArgumentError: a certificate cannot be used, or the address cannot be bound, most often because
                another process has it.
        """
        try:
            port = self._security.add_port(self._server, address)
        except RuntimeError as error:
            raise InvalidArgumentError(
                f"cannot listen on {address}: {error}; is another server using the port?"
            ) from error
        self._connection_limits.append(ConnectionLimit(port, self._connections_per_address, self._count_closed))
        return port

    def start(self) -> None:
        """Serve, and report SERVING."""
        self._server.start()
        for one in self._connection_limits:
            one.start()
        self._set_health(health_pb2.HealthCheckResponse.SERVING)
        self._ready = True

    @property
    def ready(self) -> bool:
        """Whether the server takes requests."""
        return self._ready

    def refuse(self) -> None:
        """Report NOT_SERVING, and refuse new requests, from now on."""
        self._ready = False
        self._health.enter_graceful_shutdown()
        self._requests.close()

    def wait_until_quiet(self, seconds: float) -> None:
        """Wait until no request is left and every caller has its status, but for no longer than `seconds`."""
        quiet = threading.Event()
        self._requests.when_none_left(quiet.set)
        quiet.wait(seconds)

    def drain(self, grace_seconds: float, hurried: threading.Event) -> None:
        """Report NOT_SERVING at once, refuse new requests, let running ones finish, and then end those that are left.

        Args:
            grace_seconds: how long running requests may take.
            hurried: when set, running requests are ended at once; it is set when this returns.
        """
        # The gRPC server stops last: while it stops it answers CANCELLED, which a caller takes for its own cancel.
        self.refuse()
        self._requests.when_none_left(hurried.set)
        hurried.wait(grace_seconds)
        self._server.stop(0).wait()
        for one in self._connection_limits:
            one.stop()
        self._watcher_threads.shutdown(wait=False)
        hurried.set()

    def _set_health(self, status: int) -> None:
        for name in ("", self._service_name):
            self._health.set(name, status)


def silent_call_limit(most_message_bytes: int) -> int:
    """Return how many calls may have sent no whole message yet, so that their parts take bounded memory.

    Args:
        most_message_bytes: of a message.
    """
    return min(max(PARTIAL_MESSAGE_BYTES // most_message_bytes, FEWEST_SILENT_CALLS), SILENT_CALLS)


def _options(most_message_bytes: int, threads: int, connection_seconds: float | None) -> tuple[tuple[str, int], ...]:
    """Return gRPC's options, those of every server with those of one; of two with one name gRPC takes the first."""
    own = {
        "grpc.max_receive_message_length": most_message_bytes,
        "grpc.max_concurrent_streams": threads + EXTRA_STREAMS,
        "grpc.max_allowed_incoming_connections": max_connections(),
    }
    if connection_seconds is not None:
        # gRPC varies it by a tenth. Without a grace, which is so, it waits for running calls without end: each has a
        # deadline of its own.
        own["grpc.max_connection_age_ms"] = int(connection_seconds * 1000)
    return tuple((dict(_SERVER_OPTIONS) | own).items())
