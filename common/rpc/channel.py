"""The one place that makes channels; servers share its limits and keepalive."""

import grpc

from spectrumkv.common.rpc.targets import Target
from spectrumkv.common.security import ChannelSecurity
from spectrumkv.common.security.renewed_async_channel import RenewedAsyncChannel

# A chunk is at most 1 MiB; a prompt of a million tokens, as ids or as text, fits too.
MAX_MESSAGE_BYTES = 8 << 20
# gRPC sends a ping to a peer that has been silent for the first, and gives the peer up if no answer comes within the
# second. A frozen process or a cut link therefore goes unnoticed for 8 s at most.
KEEPALIVE_SECONDS = 3
KEEPALIVE_TIMEOUT_SECONDS = 5
# Bytes of the headers of a call, and of those of its status.
MAX_METADATA_BYTES = 8 << 10

CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Only "identity": 8 MiB of gzip can hold 8 GiB, and coded KV does not compress.
    ("grpc.compression_enabled_algorithms_bitset", 1),
    ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * 1000),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_SECONDS * 1000),
    # Without this grpcio 1.85.1 waits a minute for the answer to a ping, whatever the line above says (measured).
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_SECONDS * 1000),
    ("grpc.http2.max_pings_without_data", 0),
    # So that a dead idle connection is noticed before a request is sent over it.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.absolute_max_metadata_size", 2 * MAX_METADATA_BYTES),
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    # A client must find a restarted peer again soon, even under a new address: the defaults wait up to two minutes
    # between attempts, and half a minute between look-ups of a name.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.dns_min_time_between_resolutions_ms", 1000),
    # Calls are made again by our own code: see `attempts`.
    ("grpc.enable_retries", 0),
    # Despite its name, this is how long one attempt to connect may take.
    ("grpc.min_reconnect_backoff_ms", 5000),
)


def open_channel(address: str, security: ChannelSecurity = ChannelSecurity()) -> grpc.Channel:  # noqa: B008  # frozen
    """Return a channel; it connects when it is first used.

    Args:
        address: "host:port", whose name may have several addresses; or several prefill services' addresses, separated
            by commas.
        security: TLS files and token.

    Raises:
        InvalidArgumentError: a certificate or token cannot be used, or plaintext would leave this machine.
    """
    return security.open(Target.parse(address), CHANNEL_OPTIONS)


def open_async_channel(address: str, security: ChannelSecurity = ChannelSecurity()) -> RenewedAsyncChannel:  # noqa: B008
    """Return a channel for asyncio; it connects when it is first used.

    Args:
        address: "host:port", or several prefill services' addresses, separated by commas.
        security: TLS files; its token is not sent.

    Raises:
        InvalidArgumentError: a certificate cannot be used, or plaintext would leave this machine.
    """
    return security.open_async(Target.parse(address), CHANNEL_OPTIONS)
