"""What prefill sends, held to the protocol: nothing damaged, missing or out of order passes."""

from collections.abc import Iterator

import grpc

from spectrumkv.common.decode_stream import ArrivedRequest, Request
from spectrumkv.common.errors import CancelledError, DataLossError
from spectrumkv.common.kv.wire import Chunk
from spectrumkv.common.rpc import RpcScope
from spectrumkv.v1 import decode_pb2

# gRPC tells a handler first that no request follows and then that the RPC was cancelled, if it was.
CANCEL_LAG_SECONDS = 0.2


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


def expect_nothing(messages: Iterator[Request]) -> None:
    """Wait for the close of prefill's half of the stream.

    Raises:
        DataLossError: there is one more message.
    """
    for message in messages:
        raise DataLossError(f"a Decode stream has {kind_of(message)} after End", "sequence")


def kind_of(request: Request) -> str:
    """What a request is, for errors."""
    if isinstance(request, Chunk):
        return "a chunk"
    return request.WhichOneof("message") or "an empty message"
