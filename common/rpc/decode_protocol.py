"""What a decode worker answers, held to the protocol: nothing damaged, missing, twice or out of order passes."""

from collections.abc import Iterator

from spectrumkv.common.errors import DataLossError
from spectrumkv.common.rpc.decode_stream import ArrivedResponse
from spectrumkv.v1 import decode_pb2


def expect_admitted(responses: Iterator[ArrivedResponse]) -> None:
    """Take the answer to Begin.

    Raises:
        DataLossError: it is damaged, or something else.
    """
    response = _readable(next(responses, decode_pb2.DecodeResponse()))
    if response.WhichOneof("message") != "admitted":
        raise DataLossError(f"it answered Begin with {_kind(response)} instead of Admitted", "sequence")


def tokens_and_finished(responses: Iterator[ArrivedResponse]) -> Iterator[decode_pb2.DecodeResponse]:
    """Yield tokens 1, 2, 3, …, then Finished; nothing may follow it.

    Raises:
        DataLossError: a response is damaged or is not the one that was due.
    """
    due = 1
    for response in map(_readable, responses):
        kind = response.WhichOneof("message")
        if kind == "finished" and response.finished.tokens == due - 1:
            yield response
            expect_nothing(responses)
            return
        if kind != "token" or response.token.index != due:
            raise DataLossError(f"it sent {_kind(response)} where token {due} was due", "sequence")
        yield response
        due += 1
    raise DataLossError(f"it ended the stream where token {due} or Finished was due", "missing")


def expect_nothing(responses: Iterator[ArrivedResponse]) -> None:
    """Wait for the end of the stream.

    Raises:
        DataLossError: there is one more response.
    """
    for response in map(_readable, responses):
        raise DataLossError(f"it sent {_kind(response)} after the end", "sequence")


def _readable(response: ArrivedResponse) -> decode_pb2.DecodeResponse:
    if isinstance(response, DataLossError):
        raise response
    return response


def _kind(response: decode_pb2.DecodeResponse) -> str:
    kind = response.WhichOneof("message")
    if kind == "token":
        return f"token {response.token.index}"
    return f"Finished after {response.finished.tokens} tokens" if kind == "finished" else kind or "nothing"
