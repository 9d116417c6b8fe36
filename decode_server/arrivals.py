"""What prefill sends, held to the protocol: nothing damaged, missing or out of order passes."""

import time
from collections.abc import Callable, Iterator

import grpc

from spectrumkv.common.errors import CancelledError, DataLossError
from spectrumkv.common.kv.wire import KvChunk
from spectrumkv.common.rpc.decode_stream import ArrivedRequest, Request
from spectrumkv.common.rpc.scope import RpcScope
from spectrumkv.v1 import decode_pb2

# gRPC tells a handler first that no request follows and then that the RPC was cancelled, if it was.
CANCEL_LAG_SECONDS = 0.2
# What an arrival may take of a core while streams run: a model's step waits for the slowest of its threads.
SHARE_OF_A_CORE = 0.25


def received(requests: Iterator[ArrivedRequest], scope: RpcScope) -> Iterator[Request]:
    """Yield messages to End and to the close of prefill's half of the stream.

    Raises:
        DataLossError: a message is damaged, or prefill closed its half before End.
        CancelledError: prefill went away.
        DeadlineExceededError: time ran out.
    """
    ended = False
    try:
        for request in requests:
            if isinstance(request, DataLossError):
                raise request
            ended = isinstance(request, decode_pb2.DecodeRequest) and request.HasField("end")
            yield request
    except grpc.RpcError:
        scope.check()
        raise CancelledError("the stream from prefill broke off") from None
    if not ended:
        scope.wait_for_end(CANCEL_LAG_SECONDS)
        scope.check()
        raise DataLossError("prefill closed the stream before End", "missing")


def throttled(messages: Iterator[Request], wait_until_idle: Callable[[float], object]) -> Iterator[Request]:
    """Yield messages at the pace of `SHARE_OF_A_CORE` while streams run; prefill feels it as a slower link.

    KV that comes as it is computed is slower than that; what is held up is a burst. Nothing waits between the last
    chunk and End, or after End.

    Args:
        messages: what arrives, read and worked on by one thread.
        wait_until_idle: waits for so many seconds, or until no stream runs.
    """
    worked_until = time.thread_time()
    owed = 0.0
    for message in messages:
        if isinstance(message, KvChunk) and owed > 0:
            wait_until_idle(owed)
            owed = 0.0
        yield message
        now = time.thread_time()
        owed += (now - worked_until) * (1 / SHARE_OF_A_CORE - 1)
        worked_until = now


def expect_nothing(messages: Iterator[Request]) -> None:
    """Wait for the close of prefill's half of the stream.

    Raises:
        DataLossError: there is one more message.
    """
    for message in messages:
        raise DataLossError(f"a Decode stream has {kind_of(message)} after End", "sequence")


def kind_of(request: Request) -> str:
    """What a request is, for errors."""
    if isinstance(request, KvChunk):
        return "a chunk"
    return request.WhichOneof("message") or "an empty message"
