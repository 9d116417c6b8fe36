"""Turns errors into gRPC statuses, and statuses into errors again."""

from collections.abc import Iterator
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from spectrumkv.common import errors
from spectrumkv.common.errors import (
    BasisMissingError,
    DataLossError,
    DeadlineExceededError,
    DroppedError,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    SpectrumKVError,
    UnavailableError,
    UnimplementedError,
    UnreachableError,
)

# A status travels in HTTP/2 headers, 8 KiB in all: the sentence percent-encoded (up to three times as long), and once
# more inside the details, in base64.
MAX_STATUS_MESSAGE_BYTES = 1536
# When to ask a full peer again that does not say when.
UNSAID_RETRY_SECONDS = 1.0
DEADLINE_MESSAGE = "the deadline passed; allow more time or ask for fewer tokens"

_ERRORS_BY_CODE: dict[str, type[SpectrumKVError]] = {
    error.code: error
    for error in vars(errors).values()
    if isinstance(error, type) and issubclass(error, SpectrumKVError) and error.__base__ is SpectrumKVError
}
# A status with a violation of this type stands for `BasisMissingError`, and not for another failed precondition.
_BASIS_MISSING = "SPECTRUMKV_CODEC_BASIS"
# A peer that lacks the called method is another service or another release, which `InternalError` says below.
del _ERRORS_BY_CODE[UnimplementedError.code]
# What gRPC itself says when a deadline passes, sometimes with words around it.
_GRPC_DEADLINE_DETAILS = "Deadline Exceeded"
# gRPC's server itself sets these where it drops a call; a call that its caller cancelled has another.
_GRPC_DROPPED_DETAILS = ("", "CANCELLED")
_GRPC_GOAWAY = "GOAWAY received"
# gRPC answers an oversized message with RESOURCE_EXHAUSTED, although a retry fails again.
_GRPC_OVERSIZED_DETAILS = "message larger than max"
# It says so, too, of an answer that is too large for the caller, who did not write it.
_GRPC_OVERSIZED_ANSWER = "CLIENT: Received"

_GRPC_NO_CONNECTION = "failed to connect"
# What TLS says, and what to do about it; the first entry that fits is used.
_HANDSHAKE_ERRORS = (
    (
        "certificate has expired",
        "the server's certificate has expired; it needs a new one, or this machine's clock is wrong",
    ),
    (
        "CERTIFICATE_VERIFY_FAILED",
        "the server's certificate is not from an authority that is trusted here; name the right one with --tls-ca",
    ),
    (
        "WRONG_VERSION_NUMBER",
        "the server does not speak TLS; leave out --tls-ca, or give it --tls-cert and --tls-key",
    ),
    ("Hostname Verification", "the server's certificate is for another name; use the name or address that it is for"),
    (
        "Socket closed",
        "the server closed the connection before the first request; it may expect TLS (give --tls-ca) or a "
        "certificate that it trusts (--tls-cert and --tls-key)",
    ),
)


def to_status(error: SpectrumKVError) -> grpc.Status:
    """Return the status for an error, with RetryInfo where the error says when to try again."""
    status = status_pb2.Status(code=code_pb2.Code.Value(error.code), message=_shortened(error.message))
    for message in _details(error):
        detail = any_pb2.Any()
        detail.Pack(message)
        status.details.append(detail)
    return rpc_status.to_status(status)


def end_call(context: grpc.ServicerContext, error: SpectrumKVError) -> None:
    """End a call while its handler waits for its caller to send or to read, which nothing else would wake.

    The caller gets the error's code and message, and none of its details.

    Args:
        context: the call's, on any thread.
        error: why the call ends.
    """
    # `context.cancel` says CANCELLED and no more. gRPC's own channels give this function, which that calls, a status
    # to end their calls with, and its core sends one from a server, too.
    context._rpc_event.call.cancel(grpc.StatusCode[error.code].value[0], _shortened(error.message))


def _details(error: SpectrumKVError) -> Iterator[Message]:
    """Yield the details of the status, which programs read."""
    seconds = error.retry_after_seconds if isinstance(error, ResourceExhaustedError | UnavailableError) else None
    if seconds is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(round(seconds * 1e9))
        yield error_details_pb2.RetryInfo(retry_delay=delay)
    if isinstance(error, BasisMissingError):
        violation = error_details_pb2.PreconditionFailure.Violation(type=_BASIS_MISSING)
        yield error_details_pb2.PreconditionFailure(violations=[violation])


def error_from_rpc(error: grpc.RpcError) -> SpectrumKVError:
    """Return the error that a peer raised, read from the status of its RPC."""
    code, message = error.code().name, error.details() or error.code().name
    if code == ResourceExhaustedError.code:
        if _GRPC_OVERSIZED_DETAILS in message and _GRPC_OVERSIZED_ANSWER in message:
            return InternalError(f"the peer sent a message that is too large: {message}")
        if _GRPC_OVERSIZED_DETAILS in message:
            return InvalidArgumentError(f"{message}: send less in one message, such as a shorter prompt")
        delay = _retry_delay(error)
        return ResourceExhaustedError(message, UNSAID_RETRY_SECONDS if delay is None else delay)
    if code == BasisMissingError.code and _basis_is_missing(error):
        return BasisMissingError(message)
    if code == DeadlineExceededError.code and _GRPC_DEADLINE_DETAILS in message:
        return DeadlineExceededError(DEADLINE_MESSAGE)
    if was_dropped(error):
        return DroppedError(f"the server ended the call: too many calls wait for it, or it is stopping ({message})")
    if code == DataLossError.code:
        return DataLossError(message, "peer")
    if code == UnavailableError.code:
        kind = UnavailableError if _has_details(error) else UnreachableError
        return kind(_explained(message), _retry_delay(error))
    if code in _ERRORS_BY_CODE:
        return _ERRORS_BY_CODE[code](message)
    return InternalError(f"the peer answered {code}: {message}")


def was_dropped(error: grpc.RpcError) -> bool:
    """Return whether gRPC ended the call, and not the server's own code.

    A server's gRPC does so where too many calls wait, and gives no reason. A caller's does so with a call that it was
    about to send on a connection that the server lets go of.
    """
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        return _GRPC_GOAWAY in (error.details() or "")
    return error.code() is grpc.StatusCode.CANCELLED and (error.details() or "") in _GRPC_DROPPED_DETAILS


def _explained(message: str) -> str:
    """Return gRPC's message; where it says why no connection was made, put first what to do about it."""
    for sign, meaning in _HANDSHAKE_ERRORS:
        if _GRPC_NO_CONNECTION in message and sign in message:
            return f"{meaning} ({message})"
    return message


def _retry_delay(error: grpc.RpcError) -> float | None:
    """Return after how many seconds the peer wants to be asked again; None where it does not say, or not legibly."""
    for info in _read_details(error, error_details_pb2.RetryInfo):
        return max(0.0, float(info.retry_delay.ToNanoseconds()) / 1e9)
    return None


def _basis_is_missing(error: grpc.RpcError) -> bool:
    failures = _read_details(error, error_details_pb2.PreconditionFailure)
    return any(violation.type == _BASIS_MISSING for failure in failures for violation in failure.violations)


def _has_details(error: grpc.RpcError) -> bool:
    """Return whether the status has details: services add them to theirs, gRPC never does to its own."""
    try:
        return rpc_status.from_call(error) is not None
    except (ValueError, DecodeError):
        # The details are not legible, but there are some.
        return True


def _read_details(error: grpc.RpcError, kind: type[Message]) -> list[Any]:
    """Return the details of one kind; none where they are not legible."""
    found = []
    try:
        status = rpc_status.from_call(error)
        for detail in status.details if status is not None else ():
            message = kind()
            if detail.Unpack(message):
                found.append(message)
    except (ValueError, DecodeError):
        # The details contradict the status or are no Status at all; the status itself still holds.
        return []
    return found


def _shortened(message: str) -> str:
    """Return the message cut to what a header can carry."""
    encoded = message.encode("utf-8", "replace")
    if len(encoded) <= MAX_STATUS_MESSAGE_BYTES:
        return encoded.decode()
    return encoded[: MAX_STATUS_MESSAGE_BYTES - len("…".encode())].decode(errors="ignore") + "…"
