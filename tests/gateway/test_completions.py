"""Answers of `/v1/completions` and `/v1/chat/completions`, whole and as events, over real sockets."""

import threading
from contextlib import closing
from typing import Any

import pytest

from spectrumkv.v1 import prefill_pb2
from tests.client.fake_servers import FakePrefill, finished, token
from tests.gateway.running import RunningGateway

KV = {
    "tiers": {"fp16": {"tokens": 4.0, "bytes": 1600}, "int8": {"tokens": 36.0, "bytes": 7200}},
    "kv_bytes_sent": 9000,
    "budget_counted": 0.5625,
    "ttft_seconds": 0.125,
    "handoff_seconds": 0.25,
    "decode_worker": "127.0.0.1:50052",
}


def test_a_whole_completion(gateway: RunningGateway, prefill: FakePrefill) -> None:
    answer = gateway.complete(model="tiny-llama", max_tokens=7, headers={})
    assert answer.status == 400  # `headers` is no field
    answer = gateway.complete(model="tiny-llama", max_tokens=7)
    assert answer.status == 200
    said = answer.json
    assert said["object"] == "text_completion"
    assert said["model"] == "tiny-llama"
    assert said["id"].startswith("cmpl-")
    assert said["choices"] == [{"index": 0, "text": "Blue sky!", "logprobs": None, "finish_reason": "stop"}]
    assert {name: said["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")} == {
        "prompt_tokens": 40,
        "completion_tokens": 3,
        "total_tokens": 43,
    }
    assert {name: said["usage"]["kv"][name] for name in KV} == KV
    assert prefill.requests[0].text == "x"
    assert prefill.requests[0].sampling.max_tokens == 7
    assert prefill.requests[0].model == "tiny-llama"


def test_a_whole_chat_completion(gateway: RunningGateway, prefill: FakePrefill) -> None:
    said = gateway.chat().json
    assert said["object"] == "chat.completion"
    assert said["model"] == "tiny-llama"
    assert said["choices"][0]["message"] == {"role": "assistant", "content": "Blue sky!", "refusal": None}
    assert [(one.role, one.content) for one in prefill.requests[0].chat.messages] == [
        ("user", "Why is the sky blue?")
    ]
    assert not prefill.requests[0].sampling.HasField("max_tokens")


def test_events_of_a_completion(gateway: RunningGateway) -> None:
    events = gateway.complete(stream=True, stream_options={"include_usage": True}).events
    assert [one["choices"][0]["text"] for one in events[:-1]] == ["Blue", " sky", "!", ""]
    assert [one["choices"][0]["finish_reason"] for one in events[:-1]] == [None, None, None, "stop"]
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["total_tokens"] == 43
    assert len({one["id"] for one in events}) == 1
    assert all("usage" not in one for one in gateway.complete(stream=True).events)


def test_events_of_a_chat_completion(gateway: RunningGateway) -> None:
    events = gateway.chat(stream=True).events
    assert {one["object"] for one in events} == {"chat.completion.chunk"}
    deltas = [one["choices"][0]["delta"] for one in events]
    assert deltas == [
        {"role": "assistant", "content": ""}, {"content": "Blue"}, {"content": " sky"}, {"content": "!"}, {}
    ]  # fmt: skip


def test_events_leave_as_tokens_come(gateway: RunningGateway, prefill: FakePrefill) -> None:
    first_was_seen = threading.Event()

    def answer(request: Any, context: Any) -> Any:
        yield token(0, "a")
        assert first_was_seen.wait(10)
        yield token(1, "b")
        yield finished(2)

    prefill.answer = answer
    with closing(gateway.connect()) as connection:
        connection.request("POST", "/v1/completions", b'{"prompt": "x", "stream": true}')
        with connection.getresponse() as response:
            assert b'"text":"a"' in response.readline()
            first_was_seen.set()
            assert b'"text":"b"' in response.read()


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_are_choices_of_one_answer(
    gateway: RunningGateway, prefill: FakePrefill, stream: bool
) -> None:
    def answer(request: Any, context: Any) -> Any:
        yield token(0, f"{request.text or list(request.token_ids.ids)}")
        yield finished(1)

    prefill.answer = answer
    reply = gateway.complete(prompt=["a", [5, 6]], stream=stream, stream_options={"include_usage": True})
    if not stream:
        assert reply.error["param"] == "stream_options"
        reply = gateway.complete(prompt=["a", [5, 6]])
        assert [one["text"] for one in reply.json["choices"]] == ["a", "[5, 6]"]
        usage = reply.json["usage"]
    else:
        texts = {0: "", 1: ""}
        for event in reply.events[:-1]:
            texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
        assert texts == {0: "a", 1: "[5, 6]"}
        usage = reply.events[-1]["usage"]
    assert usage["prompt_tokens"] == 80
    assert [one["kv_bytes_sent"] for one in usage["kv"]] == [9000, 9000]
    first, second = sorted(one.request_id for one in prefill.requests)
    assert (first[:-2], first[-2:], second[-2:]) == (second[:-2], "-0", "-1")


def with_logprobs(request: Any, context: Any) -> Any:
    for index in range(2):
        response = token(index, "ab"[index], ends=[None, "STOP"][index])
        response.token.logprob = -0.5
        response.token.top_logprobs.add(token_id=9, logprob=-1.5)
        yield response
    yield finished(2)


def test_log_probabilities_name_tokens_by_their_text(gateway: RunningGateway, prefill: FakePrefill) -> None:
    prefill.answer = with_logprobs
    said = gateway.complete(logprobs=1).json["choices"][0]["logprobs"]
    assert said == {
        "tokens": ["<100>", "<101>"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"<9>": -1.5}] * 2,
        "text_offset": [0, 1],
    }
    said = gateway.chat(logprobs=True, top_logprobs=1).json["choices"][0]["logprobs"]["content"]
    assert said[0] == {
        "token": "<100>",
        "logprob": -0.5,
        "bytes": list(b"<100>"),
        "top_logprobs": [{"token": "<9>", "logprob": -1.5, "bytes": list(b"<9>")}],
    }
    assert prefill.detokenized == [[9, 100, 101]]  # asked once, then known
    events = gateway.complete(logprobs=1, stream=True).events
    assert [one["choices"][0]["logprobs"]["text_offset"] for one in events[:-1]] == [[0], [1]]
    said = gateway.complete(logprobs=1, return_tokens_as_token_ids=True).json["choices"][0]["logprobs"]
    assert said["tokens"] == ["token_id:100", "token_id:101"]


def test_token_ids_where_they_are_asked_for(gateway: RunningGateway) -> None:
    assert gateway.complete(return_token_ids=True).json["choices"][0]["token_ids"] == [100, 101, 102]
    events = gateway.chat(return_token_ids=True, stream=True).events
    assert [one["choices"][0].get("token_ids") for one in events] == [None, [100], [101], [102], None]


def test_the_model_of_an_answer_is_the_served_one(gateway: RunningGateway) -> None:
    assert gateway.complete().json["model"] == "tiny-llama"
    assert gateway.get("/v1/models").json["data"][0]["id"] == "tiny-llama"
    assert gateway.get("/v1/models/tiny-llama").json["max_model_len"] == 8192
    other = gateway.get("/v1/models/other")
    assert (other.status, other.error["code"]) == (404, "model_not_found")


def test_tokenize_and_detokenize(gateway: RunningGateway, prefill: FakePrefill) -> None:
    said = gateway.ask("POST", "/tokenize", {"prompt": "Hello", "return_token_strs": True}).json
    assert said == {"count": 2, "max_model_len": 8192, "tokens": [5, 6], "token_strs": ["<5>", "<6>"]}
    gateway.ask("POST", "/tokenize", {"messages": [{"role": "user", "content": "Hello"}]})
    assert [one.WhichOneof("prompt") for one in prefill.requests] == ["text", "chat"]
    assert gateway.ask("POST", "/detokenize", {"tokens": [7, 8]}).json == {"prompt": "<7><8>"}
    assert gateway.ask("POST", "/tokenize", {}).error["param"] == "prompt"


def two_answers(request: Any, context: Any) -> Any:
    if request.echo:
        prompt = prefill_pb2.PromptTokens()
        prompt.tokens.add(token_id=5, text="He")
        second = prompt.tokens.add(token_id=6, text="llo", logprob=-2.5)
        second.top_logprobs.add(token_id=9, logprob=-0.5)
        yield prefill_pb2.GenerateResponse(prompt_tokens=prompt)
    yield token(0, "a", answer=0)
    yield token(0, "b", answer=1, ends="LENGTH")
    yield token(1, "c", answer=0, ends="STOP")
    yield finished(3)


@pytest.mark.parametrize("stream", [False, True])
def test_several_answers_to_several_prompts(gateway: RunningGateway, prefill: FakePrefill, stream: bool) -> None:
    prefill.answer = two_answers
    reply = gateway.complete(prompt=["x", "y"], n=2, stream=stream)
    texts, reasons = {}, {}
    for choice in [one["choices"][0] for one in reply.events] if stream else reply.json["choices"]:
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        reasons[choice["index"]] = choice["finish_reason"]
    assert texts == {0: "ac", 1: "b", 2: "ac", 3: "b"}
    assert reasons == {0: "stop", 1: "length", 2: "stop", 3: "length"}
    assert [one.sampling.n for one in prefill.requests] == [2, 2]


@pytest.mark.parametrize("stream", [False, True])
def test_the_prompt_comes_before_the_answer_where_that_is_asked(
    gateway: RunningGateway, prefill: FakePrefill, stream: bool
) -> None:
    prefill.answer = two_answers
    reply = gateway.complete(prompt="Hello", echo=True, logprobs=1, stream=stream, n=2)
    assert (prefill.requests[0].echo, prefill.requests[0].prompt_logprobs) == (True, 1)
    if stream:
        first = [one["choices"][0] for one in reply.events if one["choices"][0]["index"] == 0]
        assert "".join(one["text"] for one in first) == "Helloac"
        assert [one["logprobs"] and one["logprobs"]["text_offset"] for one in first] == [[0, 2], [5], [6], None]
        return
    choice = reply.json["choices"][0]
    assert choice["text"] == "Helloac"
    assert choice["logprobs"]["token_logprobs"] == [None, -2.5, None, None]
    assert choice["logprobs"]["top_logprobs"][:2] == [None, {"<9>": -0.5}]
    assert choice["logprobs"]["text_offset"] == [0, 2, 5, 6]


def test_log_probabilities_of_the_prompt(gateway: RunningGateway, prefill: FakePrefill) -> None:
    def answer(request: Any, context: Any) -> Any:
        request.echo = True
        yield from two_answers(request, context)

    prefill.answer = answer
    said = gateway.complete(prompt="Hello", prompt_logprobs=1, n=2).json["choices"][0]
    assert said["text"] == "ac"
    assert said["prompt_logprobs"] == [
        None,
        {
            "6": {"logprob": -2.5, "rank": None, "decoded_token": "<6>"},
            "9": {"logprob": -0.5, "rank": 1, "decoded_token": "<9>"},
        },
    ]
    refused = gateway.complete(prompt_logprobs=1, stream=True)
    assert refused.error["param"] == "prompt_logprobs"
