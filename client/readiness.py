"""Whether a server is ready, by the standard health service, without polling."""

import time
from collections.abc import Iterator

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from spectrumkv.common.errors import CancelledError, DeadlineExceededError, SpectrumKVError
from spectrumkv.common.rpc.status import error_from_rpc

# How long finding out why there is no connection may take: the last attempt's outcome is known at once.
REASON_SECONDS = 1.0


def is_serving(channel: grpc.Channel, timeout: float) -> bool:
    """Ask the server behind `channel` once.

    Args:
        channel: to the server.
        timeout: seconds.

    Raises:
        SpectrumKVError: the server cannot be reached or has no health service.
    """
    try:
        response = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout)
    except grpc.RpcError as error:
        raise error_from_rpc(error) from error
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


def wait_until_serving(channel: grpc.Channel, address: str, timeout: float) -> None:
    """Wait for the server behind `channel`, which need not listen yet.

    gRPC waits for the connection (`wait_for_ready`) and then for the server's own word (`Watch`), so that
    nothing here asks in a loop.

    Args:
        channel: to the server; closing it ends the wait.
        address: the server, for the error.
        timeout: seconds.

    Raises:
        DeadlineExceededError: the server is not ready in time; the message has the last status.
        CancelledError: the channel was closed meanwhile.
        SpectrumKVError: the server has no health service.
    """
    deadline = time.monotonic() + timeout
    last_status = ""
    while True:
        try:
            for last_status in _statuses(channel, deadline - time.monotonic()):
                if last_status == "SERVING":
                    return
        except ValueError:
            # What gRPC raises for a call on a channel that another thread has closed.
            raise CancelledError(f"the wait for {address} was called off") from None
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                state = f"health: {last_status}" if last_status else _why_no_answer(channel)
                raise DeadlineExceededError(f"{address} is not ready after {timeout:g} s ({state})") from error
            # A server that went away while it was watched may come back before the deadline. CANCELLED is
            # also what closing the channel gives; then the next round finds it closed.
            if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
                raise error_from_rpc(error) from error


def _why_no_answer(channel: grpc.Channel) -> str:
    """What stands in the way of a connection: a call that waits for one is never told."""
    try:
        is_serving(channel, REASON_SECONDS)
    except SpectrumKVError as error:
        return f"no answer: {error.message}"
    except ValueError:
        # As above: another thread has closed the channel meanwhile.
        return "no answer"
    return "no answer in time"


def _statuses(channel: grpc.Channel, timeout: float) -> Iterator[str]:
    """Yield the name of each health status that the server reports, until `timeout` seconds are over."""
    watch = health_pb2_grpc.HealthStub(channel).Watch(
        health_pb2.HealthCheckRequest(), timeout=max(timeout, 0.0), wait_for_ready=True
    )
    try:
        for response in watch:
            yield health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)
    finally:
        watch.cancel()
