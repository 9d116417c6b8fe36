"""What the proxy asks of prefill and decode, and what it makes of their answers."""

from typing import Any

import pytest

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.vllm_plugin.proxy.answers import first_chunks, joined, next_chunk
from spectrumkv.vllm_plugin.proxy.bodies import ClientRequest, PrefillAnswer

TRANSFER = {"do_remote_prefill": True, "transfer_id": "t"}


def completion(**body: Any) -> ClientRequest:
    return ClientRequest({"model": "m", "prompt": "Once"} | body, is_chat=False)


def chat(**body: Any) -> ClientRequest:
    messages = [{"role": "user", "content": "Hello"}]
    return ClientRequest({"model": "m", "messages": messages} | body, is_chat=True)


def first(text: str = " upon", **choice: Any) -> PrefillAnswer:
    answer = {
        "id": "p",
        "created": 7,
        "model": "m",
        "choices": [
            {"text": text, "token_ids": [9], "prompt_token_ids": [1, 2, 3], "finish_reason": "length"} | choice
        ],
        "kv_transfer_params": TRANSFER,
    }
    return PrefillAnswer.of(answer, most_tokens=100)


def test_prefill_computes_one_token_and_hands_its_kv_out() -> None:
    body = completion(max_tokens=5, stream=True, stream_options={}, min_tokens=3, temperature=0.5).for_prefill("t")
    assert body == {
        "model": "m",
        "prompt": "Once",
        "temperature": 0.5,
        "max_tokens": 1,
        "return_token_ids": True,
        "kv_transfer_params": {"do_remote_decode": True, "transfer_id": "t", "fetches": 1},
    }


def test_a_budget_of_the_request_reaches_prefill() -> None:
    body = completion(kv_transfer_params={"budget": 0.5, "policy": "adaptive"}, n=3).for_prefill("t")
    wanted = body["kv_transfer_params"]
    assert (wanted["budget"], wanted["policy"], wanted["fetches"]) == (0.5, "adaptive", 3)
    assert "n" not in body


def test_nothing_is_handed_out_for_one_token() -> None:
    assert completion(max_tokens=1).for_prefill("t")["kv_transfer_params"] == {}


@pytest.mark.parametrize(("request_", "left"), [(completion(), 15), (completion(max_tokens=2), 1), (chat(), 96)])
def test_decode_goes_on_after_the_first_token(request_: ClientRequest, left: int) -> None:
    body = request_.continuing(first())
    assert (body["prompt"], body["max_tokens"], body["kv_transfer_params"]) == ([1, 2, 3, 9], left, TRANSFER)
    assert "messages" not in body


@pytest.mark.parametrize(
    "needs",
    [{"n": 2}, {"stop": ["x"]}, {"presence_penalty": 0.1}, {"repetition_penalty": 1.1}, {"min_tokens": 2},
     {"response_format": {"type": "json_object"}}, {"echo": True}, {"tools": [{}]}],
)  # fmt: skip
def test_answers_that_depend_on_their_first_token_are_generated_whole(needs: dict[str, Any]) -> None:
    request = completion(**needs)
    assert not request.appends_first_token
    assert request.for_decode(TRANSFER) == request.body | {"kv_transfer_params": TRANSFER}


@pytest.mark.parametrize(
    "plain", [{}, {"n": 1}, {"stop": []}, {"presence_penalty": 0.0}, {"repetition_penalty": 1.0}, {"logprobs": 2}]
)
def test_others_go_on(plain: dict[str, Any]) -> None:
    assert completion(**plain).appends_first_token


def test_a_chat_with_log_probabilities_is_generated_whole() -> None:
    assert not chat(logprobs=True).appends_first_token


def test_the_answer_is_one() -> None:
    rest = {
        "id": "d",
        "model": "m",
        "choices": [
            {"index": 0, "text": " a time", "finish_reason": "length", "logprobs": {"tokens": [" a", " time"]}}
        ],
        "usage": {"prompt_tokens": 4, "completion_tokens": 2, "total_tokens": 6},
    }
    answer = joined(completion(), first(logprobs={"tokens": [" upon"]}), rest)
    assert answer["id"] == "p"
    assert answer["choices"][0]["text"] == " upon a time"
    assert answer["choices"][0]["logprobs"]["tokens"] == [" upon", " a", " time"]
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    as_chat = joined(chat(), first(), rest)
    assert as_chat["choices"][0]["message"] == {"role": "assistant", "content": " upon a time"}
    assert as_chat["object"] == "chat.completion"


def test_a_stream_begins_with_prefills_token_and_goes_on_with_decodes() -> None:
    chunk = {
        "id": "d",
        "choices": [{"index": 0, "text": " a", "finish_reason": None, "token_ids": [5]}],
        "usage": {"prompt_tokens": 4, "completion_tokens": 1, "total_tokens": 5},
    }
    role, begun = first_chunks(chat(), first())
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert begun["choices"][0]["delta"] == {"content": " upon"}
    made = next_chunk(chat(), first(), chunk)
    assert made["id"] == "p"
    assert made["choices"] == [{"index": 0, "finish_reason": None, "delta": {"content": " a"}}]
    assert made["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    (plain,) = first_chunks(completion(), first())
    assert plain["choices"][0]["text"] == " upon"
    assert next_chunk(completion(), first(), chunk)["choices"][0]["text"] == " a"


@pytest.mark.parametrize(("text", "whole"), [(" upon", True), ("", False), ("\ufffd", False), ("é", True)])
def test_a_part_of_a_character_is_not_sent(text: str, whole: bool) -> None:
    assert first(text).is_whole_text is whole


@pytest.mark.parametrize(
    "body", [{"prompt": ["a", "b"]}, {"prompt": [[1], [2]]}, {"prompt": None}, {"n": 0}, {"max_tokens": "5"}]
)
def test_what_the_proxy_cannot_serve_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError):
        completion(**body)
