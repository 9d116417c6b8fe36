"""Which message may come when in a Decode stream, checked by the side that receives it.

Prefill sends Begin, chunks, End, and closes its half. Decode answers Admitted, tokens 1, 2, 3, … of each answer,
Finished; where the first token ended every answer, nothing follows Admitted. A message that is damaged, missing,
repeated or out of order ends the stream with DATA_LOSS.
"""

import math
from collections.abc import Iterable, Iterator, Mapping

import grpc

from spectrumkv.common.errors import CancelledError, DataLossError, InternalError
from spectrumkv.common.kv.wire import KvChunk
from spectrumkv.common.rpc.decode_stream import ArrivedRequest, ArrivedResponse, Request
from spectrumkv.common.rpc.scope import RpcScope
from spectrumkv.v1 import decode_pb2, generation_pb2

# gRPC first tells a handler that no request follows and only then, if so, that the RPC was cancelled.
CANCEL_LAG_SECONDS = 0.2


def requests_until_close(requests: Iterator[ArrivedRequest], scope: RpcScope) -> Iterator[Request]:
    """Yield prefill's messages until it closes its half of the stream, which it may do only after End.

    Args:
        requests: what gRPC hands to the handler.
        scope: the handler's RPC.

    Yields:
        Messages that are not damaged, in the order in which they arrived.

    Raises:
        DataLossError: a message is damaged, or prefill closed its half before End.
        CancelledError: prefill went away.
        DeadlineExceededError: the deadline passed.
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


def expect_begin(requests: Iterator[Request]) -> decode_pb2.DecodeRequest:
    """Return the first message, which must be Begin.

    Raises:
        DataLossError: the stream starts with another message.
    """
    request = next(requests)
    if isinstance(request, KvChunk) or request.WhichOneof("message") != "begin":
        raise DataLossError(f"a Decode stream starts with Begin, not with {_request_kind(request)}", "sequence")
    return request


def expect_end(request: decode_pb2.DecodeRequest) -> decode_pb2.End:
    """Return End from a message that is no chunk.

    Raises:
        DataLossError: it is another message.
    """
    if request.WhichOneof("message") != "end":
        raise DataLossError(f"a Decode stream has {_request_kind(request)} where KV was due", "sequence")
    return request.end


def expect_no_request(requests: Iterator[Request]) -> None:
    """Wait until prefill closes its half of the stream.

    Raises:
        DataLossError: a message follows End.
    """
    for request in requests:
        raise DataLossError(f"a Decode stream has {_request_kind(request)} after End", "sequence")


def expect_admitted(responses: Iterator[ArrivedResponse]) -> None:
    """Wait for decode's answer to Begin.

    Raises:
        DataLossError: the answer is damaged, or is not Admitted.
    """
    response = _undamaged(next(responses, decode_pb2.DecodeResponse()))
    if response.WhichOneof("message") != "admitted":
        raise DataLossError(f"it answered Begin with {_response_kind(response)} instead of Admitted", "sequence")


def tokens_and_finished(
    responses: Iterator[ArrivedResponse], vocab_size: int, answers: Iterable[int] = (0,)
) -> Iterator[decode_pb2.DecodeResponse]:
    """Yield the tokens 1, 2, 3, … of each answer, then Finished, and wait until decode closes the stream.

    Args:
        responses: what gRPC hands to prefill, after Admitted.
        vocab_size: of the model; ids of tokens are less.
        answers: those that the first token did not end.

    Yields:
        Tokens of different answers in any order, those of one answer in theirs; the last token of each says why.

    Raises:
        DataLossError: a response is damaged or is not one that was due.
        InternalError: a response that is not damaged has what no model generates.
    """
    due = dict.fromkeys(answers, 1)
    for tokens, response in enumerate(map(_undamaged, responses)):
        kind, token = response.WhichOneof("message"), response.token
        if kind == "finished" and not due and response.finished.tokens == tokens:
            yield response
            expect_no_response(responses)
            return
        if kind != "token" or due.get(token.answer) != token.index:
            raise DataLossError(f"it sent {_response_kind(response)} where {_due(due)} was due", "sequence")
        _check_token(token, vocab_size)
        yield response
        due[token.answer] += 1
        if token.finish_reason:
            del due[token.answer]
    raise DataLossError(f"it ended the stream where {_due(due)} was due", "missing")


def _check_token(token: generation_pb2.Token, vocab_size: int) -> None:
    """Check that a worker's token is one of the model, with log-probabilities that are numbers.

    Raises:
        InternalError: it is not.
    """
    ids = [token.token_id, *(one.token_id for one in token.top_logprobs)]
    if max(ids) >= vocab_size:
        raise InternalError(
            f"it sent token id {max(ids)} in token {token.index} of answer {token.answer}; the vocabulary has "
            f"{vocab_size}"
        )
    logprobs = [token.logprob, *(one.logprob for one in token.top_logprobs)]
    if any(math.isnan(one) for one in logprobs):
        raise InternalError(f"it sent a log-probability of NaN in token {token.index} of answer {token.answer}")


def _due(due: Mapping[int, int]) -> str:
    """Return how errors call what was due: the next token of each answer, or Finished."""
    return " or ".join(f"token {token} of answer {answer}" for answer, token in due.items()) or "Finished"


def expect_no_response(responses: Iterator[ArrivedResponse]) -> None:
    """Wait until decode closes the stream.

    Raises:
        DataLossError: one more response arrives.
    """
    for response in map(_undamaged, responses):
        raise DataLossError(f"it sent {_response_kind(response)} after the end", "sequence")


def _undamaged(response: ArrivedResponse) -> decode_pb2.DecodeResponse:
    if isinstance(response, DataLossError):
        raise response
    return response


def _request_kind(request: Request) -> str:
    """Return how errors call a request."""
    if isinstance(request, KvChunk):
        return "a chunk"
    return request.WhichOneof("message") or "an empty message"


def _response_kind(response: decode_pb2.DecodeResponse) -> str:
    """Return how errors call a response."""
    kind = response.WhichOneof("message")
    if kind == "token":
        return f"token {response.token.index} of answer {response.token.answer}"
    return f"Finished after {response.finished.tokens} tokens" if kind == "finished" else kind or "nothing"
