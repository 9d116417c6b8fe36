"""The one place that makes channels and servers, and all that the services need to know of gRPC."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.rpc.interceptor import (
    StatusInterceptor,
    as_known_error,
    requests_served,
    uploads_served,
    watchers_served,
)
from spectrumkv.common.rpc.scope import RpcScope
from spectrumkv.common.rpc.status import error_from_rpc, to_status
from spectrumkv.common.rpc.targets import Target
from spectrumkv.common.security import ChannelSecurity, ServerSecurity

__all__ = [
    "MAX_MESSAGE_BYTES",
    "RpcScope",
    "Server",
    "as_known_error",
    "error_from_rpc",
    "open_channel",
    "to_status",
]

# A chunk is at most 1 MiB; a prompt of a million tokens, as ids or as text, fits too.
MAX_MESSAGE_BYTES = 8 << 20
# Streams that only watch health or ask for reflection; each holds a thread.
WATCHERS = 32
# Codec bases on their way, once for each prefill worker.
UPLOADS = 4
# Health checks and GetServerInfo must find a thread while every place for streams is taken.
SPARE_THREADS = 8
# RPCs that wait for a thread: only bursts of those above, and of requests about to be refused.
QUEUED_RPCS = 1024
# A peer that says nothing for the first is asked, and given up where it does not answer within the second. That, 8 s,
# is how long a frozen process or a cut link can go unnoticed.
KEEPALIVE_SECONDS = 3
KEEPALIVE_TIMEOUT_SECONDS = 5
# For TLS and the first frames of HTTP/2; who connects and says nothing holds no socket for longer.
HANDSHAKE_SECONDS = 10
# Headers of a call, and of its status.
MAX_METADATA_BYTES = 8 << 10

_CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Only "identity": 8 MiB of gzip can be 8 GiB, and coded KV does not compress.
    ("grpc.compression_enabled_algorithms_bitset", 1),
    ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * 1000),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_SECONDS * 1000),
    # Without it grpcio 1.85.1 waits a minute for the answer to a ping, whatever the line above says (measured).
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_SECONDS * 1000),
    ("grpc.http2.max_pings_without_data", 0),
    # An idle connection that died is found out before a request is sent over it.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.absolute_max_metadata_size", 2 * MAX_METADATA_BYTES),
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    # A restarted peer must be found again soon, also under a new address: the defaults wait up to two minutes
    # between attempts, and half a minute between look-ups of a name.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.dns_min_time_between_resolutions_ms", 1000),
    # Despite its name: how long one attempt to connect may take.
    ("grpc.min_reconnect_backoff_ms", 5000),
)
_SERVER_OPTIONS = (
    *_CHANNEL_OPTIONS,
    # Without this a second server binds the same port silently and takes half the requests.
    ("grpc.so_reuseport", 0),
    # Without these the server takes the pings above for an attack.
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_SECONDS * 500),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.server_handshake_timeout_ms", HANDSHAKE_SECONDS * 1000),
)


def open_channel(address: str, security: ChannelSecurity = ChannelSecurity()) -> grpc.Channel:  # noqa: B008  # frozen
    """Return a channel to `address` ("host:port", or several prefill services', separated by commas).

    It connects when it is first used.

    Raises:
        InvalidArgumentError: a certificate or token cannot be used, or plaintext would leave this machine.
    """
    return security.open(Target.parse(address), _CHANNEL_OPTIONS)


class Server:
    """A gRPC server for one service, with health checks, optional reflection, and errors turned into statuses.

    Args:
        add_servicer: the generated function that registers a servicer.
        servicer: serves the RPCs.
        service_name: full name of the service, as health checks and reflection know it.
        threads: streams served at once; each holds a thread, and more are refused with RESOURCE_EXHAUSTED.
        count_ended: called with the status code's name at the end of every stream.
        reflection_enabled: let clients ask which services and messages there are.
        security: what is asked of callers.

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
        reflection_enabled: bool = False,
        security: ServerSecurity = ServerSecurity(),  # noqa: B008  # frozen
    ) -> None:
        self._service_name = service_name
        self._security = security
        self._requests = requests_served(threads)
        pool = threads + WATCHERS + UPLOADS + SPARE_THREADS
        self._server = grpc.server(
            ThreadPoolExecutor(pool, thread_name_prefix="rpc"),
            interceptors=(
                StatusInterceptor(self._requests, watchers_served(WATCHERS), uploads_served(UPLOADS), count_ended),
                *security.interceptors(),
            ),
            options=_SERVER_OPTIONS,
            maximum_concurrent_rpcs=pool + QUEUED_RPCS,
        )
        # With the non-blocking `Watch`, a watcher that leaves while another comes, or while the status changes,
        # locks up the whole server (github.com/grpc/grpc/pull/43403).
        self._health = health.HealthServicer(experimental_non_blocking=False)
        add_servicer(servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if reflection_enabled:
            names = [service_name, health.SERVICE_NAME, reflection.SERVICE_NAME]
            reflection.enable_server_reflection(names, self._server)
        self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)

    def bind(self, address: str) -> int:
        """Listen on `address` and return the port (of interest where the address said 0).

        Raises:
            InvalidArgumentError: a certificate cannot be used, or the address cannot be bound, most often because
                another process has it.
        """
        try:
            return self._security.add_port(self._server, address)
        except RuntimeError as error:
            raise InvalidArgumentError(
                f"cannot listen on {address}: {error}; is another server using the port?"
            ) from error

    def start(self) -> None:
        """Serve, and report ready."""
        self._server.start()
        self._set_health(health_pb2.HealthCheckResponse.SERVING)

    def drain(self, grace_seconds: float, hurried: threading.Event) -> None:
        """Report not-ready at once, refuse new requests, let running ones finish, and end the rest in the end.

        Args:
            grace_seconds: when running requests are ended.
            hurried: ends them at once when set; set in any case when this returns.
        """

        self._health.enter_graceful_shutdown()
        # The server itself stops last: a request that meets a stopping gRPC server is told CANCELLED, which it
        # cannot tell from its own doing.
        self._requests.close()
        self._requests.when_none(hurried.set)
        hurried.wait(grace_seconds)
        self._server.stop(0).wait()
        hurried.set()

    def _set_health(self, status: int) -> None:
        for name in ("", self._service_name):
            self._health.set(name, status)
