"""Ask the standard health service whether a server is ready, and wait until it is, without polling."""

import time
from collections.abc import Iterator

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from spectrumkv.common.errors import CancelledError, DeadlineExceededError, SpectrumKVError
from spectrumkv.common.rpc.status import error_from_rpc

# Time allowed for finding out why there is no connection. gRPC knows the outcome of its last attempt at once.
REASON_SECONDS = 1.0


def is_serving(channel: grpc.Channel, timeout: float | None) -> bool:
    """Ask the server behind `channel` once.

    Args:
        channel: the connection to the server.
        timeout: seconds until the call is given up; None is never.

    Returns:
        True if the server is ready.

    Raises:
        SpectrumKVError: the server cannot be reached or has no health service.
    """  # noqa: DOC501  # the rule wants `error_from_rpc` itself; it makes a SpectrumKVError
    try:
        response = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout)
    except grpc.RpcError as error:
        raise error_from_rpc(error) from error
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


def wait_until_serving(channel: grpc.Channel, address: str, timeout: float | None) -> None:
    """Wait for the server behind `channel`, which need not listen yet.

    gRPC waits for the connection (`wait_for_ready`), and then the server reports each change of its status
    (`Watch`), so that nothing is polled.

    Args:
        channel: the connection to the server; closing it ends the wait.
        address: the server, which error messages name.
        timeout: seconds that the server has to become ready; None is no limit.

    Raises:
        DeadlineExceededError: the server is not ready in time; the message names its last status.
        CancelledError: the channel was closed during the wait.
        SpectrumKVError: the server has no health service.
    """  # noqa: DOC501  # the rule wants `error_from_rpc` itself; it makes a SpectrumKVError
    deadline = None if timeout is None else time.monotonic() + timeout
    last_status = ""
    while True:
        try:
            for last_status in _statuses(channel, None if deadline is None else deadline - time.monotonic()):
                if last_status == "SERVING":
                    return
        except ValueError:
            # gRPC raises this for a call on a channel that another thread has closed.
            raise CancelledError(f"the wait for {address} was called off") from None
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and timeout is not None:
                state = f"health: {last_status}" if last_status else _why_no_answer(channel)
                raise DeadlineExceededError(f"{address} is not ready after {timeout:g} s ({state})") from error
            # A server that went away may come back before the deadline. Closing the channel gives CANCELLED too;
            # the next round then finds the channel closed.
            if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
                raise error_from_rpc(error) from error


def _why_no_answer(channel: grpc.Channel) -> str:
    """Ask once without `wait_for_ready`: a call that waits for a connection never learns why there is none.

    Returns:
        The reason in a few words, for an error message.
    """
    try:
        is_serving(channel, REASON_SECONDS)
    except SpectrumKVError as error:
        return f"no answer: {error.message}"
    except ValueError:
        # Another thread has closed the channel, as above.
        return "no answer"
    return "no answer in time"


def _statuses(channel: grpc.Channel, timeout: float | None) -> Iterator[str]:
    """Yield the name of each health status that the server reports, for at most `timeout` seconds."""
    watch = health_pb2_grpc.HealthStub(channel).Watch(
        health_pb2.HealthCheckRequest(), timeout=None if timeout is None else max(timeout, 0.0), wait_for_ready=True
    )
    try:
        for response in watch:
            yield health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)
    finally:
        watch.cancel()
