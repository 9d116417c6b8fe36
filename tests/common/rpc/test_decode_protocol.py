"""Which message may come when in a Decode stream, on both sides."""

import math
from collections.abc import Iterator
from typing import Any, cast

import grpc
import pytest

from spectrumkv.common.errors import CancelledError, DataLossError, InternalError
from spectrumkv.common.kv.wire import KvChunk
from spectrumkv.common.rpc.decode_protocol import (
    expect_admitted,
    expect_begin,
    expect_end,
    expect_no_request,
    expect_no_response,
    requests_until_close,
    tokens_and_finished,
)
from spectrumkv.common.rpc.decode_stream import ArrivedRequest, ArrivedResponse
from spectrumkv.common.rpc.scope import RpcScope
from spectrumkv.v1 import decode_pb2, generation_pb2

BEGIN = decode_pb2.DecodeRequest(begin=decode_pb2.Begin(request_id="one"))
CHUNK = KvChunk(0, 0, (b"",))
END = decode_pb2.DecodeRequest(end=decode_pb2.End(chunks=1))
ADMITTED = decode_pb2.DecodeResponse(admitted=decode_pb2.Admitted(slots=3))
VOCAB_SIZE = 10
DAMAGED = DataLossError("a message is damaged", "crc")


def token(index: int, last: bool = False, answer: int = 0) -> decode_pb2.DecodeResponse:
    reason = generation_pb2.FINISH_REASON_STOP if last else generation_pb2.FINISH_REASON_UNSPECIFIED
    return decode_pb2.DecodeResponse(token=generation_pb2.Token(index=index, answer=answer, finish_reason=reason))


def finished(tokens: int) -> decode_pb2.DecodeResponse:
    return decode_pb2.DecodeResponse(finished=decode_pb2.DecodeFinished(tokens=tokens))


class FakeScope:
    """The scope of an RPC that prefill cancelled, or did not."""

    def __init__(self, cancelled: bool = False) -> None:
        self._cancelled = cancelled

    def wait_for_end(self, seconds: float) -> None:
        assert seconds > 0

    def check(self) -> None:
        if self._cancelled:
            raise CancelledError("the caller cancelled the request")


def read(requests: Iterator[ArrivedRequest] | list[Any], cancelled: bool = False) -> list[Any]:
    return list(requests_until_close(iter(requests), cast(RpcScope, FakeScope(cancelled))))


def refusal(call: Any, *arguments: Any) -> DataLossError:
    with pytest.raises(DataLossError) as caught:
        list(call(*arguments) or ())
    return caught.value


def test_requests_are_those_that_were_sent() -> None:
    assert read([BEGIN, CHUNK, CHUNK, END]) == [BEGIN, CHUNK, CHUNK, END]


def test_a_damaged_request_ends_the_stream_with_its_own_error() -> None:
    assert refusal(read, [BEGIN, DAMAGED, END]) is DAMAGED


@pytest.mark.parametrize("requests", [[], [BEGIN], [BEGIN, CHUNK], [BEGIN, CHUNK, END, CHUNK]])
def test_prefill_may_close_its_half_only_after_end(requests: list[Any]) -> None:
    assert refusal(read, requests).reason == "missing"
    with pytest.raises(CancelledError):
        read(requests, cancelled=True)


def test_a_stream_that_breaks_off_is_a_cancel() -> None:
    def broken() -> Iterator[ArrivedRequest]:
        yield BEGIN
        raise grpc.RpcError

    with pytest.raises(CancelledError, match="broke off"):
        read(broken())


@pytest.mark.parametrize("first", [CHUNK, END, decode_pb2.DecodeRequest()])
def test_begin_comes_first(first: Any) -> None:
    assert expect_begin(iter([BEGIN])) is BEGIN
    assert refusal(expect_begin, iter([first])).reason == "sequence"


def test_end_comes_after_the_chunks_and_nothing_after_it() -> None:
    assert expect_end(END) == END.end
    assert refusal(expect_end, BEGIN).message == "a Decode stream has begin where KV was due"
    expect_no_request(iter([]))
    assert refusal(expect_no_request, iter([CHUNK])).message == "a Decode stream has a chunk after End"


@pytest.mark.parametrize("answers", [[], [token(1)], [finished(0)], [decode_pb2.DecodeResponse()]])
def test_admitted_answers_begin(answers: list[ArrivedResponse]) -> None:
    expect_admitted(iter([ADMITTED]))
    assert refusal(expect_admitted, iter(answers)).reason == "sequence"
    assert refusal(expect_admitted, iter([DAMAGED])) is DAMAGED


def test_tokens_come_in_order_and_finished_counts_them() -> None:
    answers = [token(1), token(2), token(3, last=True), finished(3)]
    assert list(tokens_and_finished(iter(answers), VOCAB_SIZE)) == answers


def test_answers_go_on_beside_each_other_and_each_ends_by_itself() -> None:
    answers = [token(1, answer=2), token(1, answer=0), token(2, True, 2), token(2, True, 0), finished(4)]
    assert list(tokens_and_finished(iter(answers), VOCAB_SIZE, (0, 2))) == answers
    assert refusal(tokens_and_finished, iter(answers), VOCAB_SIZE, (0,)).message == (
        "it sent token 1 of answer 2 where token 1 of answer 0 was due"
    )


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ([token(2)], "sequence"),
        ([token(1), token(1)], "sequence"),
        ([token(1), token(3)], "sequence"),
        ([token(1), finished(1)], "sequence"),
        ([token(1, last=True), finished(2)], "sequence"),
        ([token(1, last=True), token(2)], "sequence"),
        ([token(1), ADMITTED], "sequence"),
        ([token(1, last=True), finished(1), token(2)], "sequence"),
        ([token(1), DAMAGED], "crc"),
        ([token(1, last=True), finished(1), DAMAGED], "crc"),
        ([], "missing"),
        ([token(1)], "missing"),
    ],
)
def test_other_answers_are_refused(answers: list[ArrivedResponse], reason: str) -> None:
    assert refusal(tokens_and_finished, iter(answers), VOCAB_SIZE).reason == reason


@pytest.mark.parametrize(
    ("lie", "sentence"),
    [
        ({"token_id": VOCAB_SIZE}, "it sent token id 10 in token 1 of answer 0; the vocabulary has 10"),
        (
            {"top_logprobs": [generation_pb2.TokenLogprob(token_id=2**32 - 1)]},
            "it sent token id 4294967295 in token 1 of answer 0; the vocabulary has 10",
        ),
        ({"logprob": math.nan}, "it sent a log-probability of NaN in token 1 of answer 0"),
        (
            {"top_logprobs": [generation_pb2.TokenLogprob(logprob=math.nan)]},
            "it sent a log-probability of NaN in token 1 of answer 0",
        ),
    ],
)
def test_what_no_model_generates_is_the_workers_fault(lie: dict[str, Any], sentence: str) -> None:
    wrong = token(1)
    wrong.token.MergeFrom(generation_pb2.Token(**lie))
    with pytest.raises(InternalError) as caught:
        list(tokens_and_finished(iter([wrong]), VOCAB_SIZE))
    assert caught.value.message == sentence
    right = token(1, last=True)
    right.token.MergeFrom(generation_pb2.Token(token_id=VOCAB_SIZE - 1, logprob=-math.inf))
    assert list(tokens_and_finished(iter([right, finished(1)]), VOCAB_SIZE)) == [right, finished(1)]


def test_nothing_follows_the_end() -> None:
    expect_no_response(iter([]))
    assert refusal(expect_no_response, iter([token(4)])).message == "it sent token 4 of answer 0 after the end"
