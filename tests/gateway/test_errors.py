"""Errors have the OpenAI API's form and the right status; what is wrong is named."""

import threading
from typing import Any

import pytest

from spectrumkv.common import errors
from tests.client.fake_servers import FakePrefill, finished, token
from tests.gateway.running import WAIT_SECONDS, RunningGateway, running_gateway
from tests.waiting import until


@pytest.mark.parametrize(
    ("raised", "status", "code"),
    [
        (errors.InvalidArgumentError("max_tokens is 0"), 400, None),
        (errors.FailedPreconditionError("larger than the worker"), 400, "failed_precondition"),
        (errors.UnauthenticatedError("asks for a token"), 401, "invalid_api_key"),
        (errors.PermissionDeniedError("takes no work"), 403, None),
        (errors.NotFoundError("model 'x' is not served"), 404, "model_not_found"),
        (errors.DeadlineExceededError("the deadline passed"), 408, "deadline_exceeded"),
        (errors.ResourceExhaustedError("no slots", 1.2), 429, "no_room"),
        (errors.UnavailableError("no decode worker answers", 3.0), 503, None),
        (errors.DataLossError("chunk 3 came twice", "duplicate"), 500, None),
        (errors.InternalError("broken"), 500, None),
    ],
    ids=lambda one: one.code if isinstance(one, Exception) else None,
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_error_of_the_services(
    gateway: RunningGateway,
    prefill: FakePrefill,
    raised: errors.SpectrumKVError,
    status: int,
    code: str,
    stream: bool,
) -> None:
    def answer(request: Any, context: Any) -> Any:
        raise raised
        yield

    prefill.answer = answer
    reply = gateway.complete(stream=stream, model="m")
    assert (reply.status, reply.error["message"], reply.error["code"]) == (status, raised.message, code)
    assert reply.headers.get("retry-after") == {429: "2", 503: "3"}.get(status)
    assert ("www-authenticate" in reply.headers) == (status == 401)
    until(lambda: gateway.counted("/v1/completions", status) == 1)


def test_an_error_after_the_first_token_is_the_last_event(gateway: RunningGateway, prefill: FakePrefill) -> None:
    def answer(request: Any, context: Any) -> Any:
        yield token(0, "a")
        raise errors.DataLossError("the digest differs", "digest")

    prefill.answer = answer
    events = gateway.complete(stream=True).events
    assert events[0]["choices"][0]["text"] == "a"
    assert events[-1]["error"]["message"] == "the digest differs"
    assert gateway.complete().status == 500


@pytest.mark.parametrize("stream", [False, True])
def test_one_of_several_prompts_fails(gateway: RunningGateway, prefill: FakePrefill, stream: bool) -> None:
    """The other is cancelled, and the answer is the error."""
    good_began, good_ended = threading.Event(), threading.Event()

    def answer(request: Any, context: Any) -> Any:
        yield token(0, "a")
        if request.text == "bad":
            # What has not begun cannot be cancelled where the test sees it.
            good_began.wait(WAIT_SECONDS)
            raise errors.InvalidArgumentError("bad prompt")
        context.add_callback(good_ended.set)
        good_began.set()
        good_ended.wait(WAIT_SECONDS)
        yield finished(1)

    prefill.answer = answer
    reply = gateway.complete(prompt=["bad", "good"], stream=stream)
    assert (reply.events[-1] if stream else reply.json)["error"]["message"] == "bad prompt"
    assert reply.status == (200 if stream else 400)
    assert good_ended.wait(WAIT_SECONDS)


def test_prefill_is_away() -> None:
    with running_gateway("127.0.0.1:1") as gateway:
        assert gateway.complete(model="m").status == 503
        assert gateway.get("/health").status == 503
        assert gateway.get("/v1/models").status == 503


def test_the_gateways_deadline(prefill: FakePrefill) -> None:
    prefill.answer = lambda request, context: iter([token(0, "a")] if prefill.ended.wait(10) else [])
    with running_gateway(prefill.address, deadline="0.3") as gateway:
        reply = gateway.complete(model="m")
    assert (reply.status, reply.error["code"]) == (408, "deadline_exceeded")
    assert "within 0.3 s" in reply.error["message"]


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        (b"", None, "the body is no JSON"),
        (b"{", None, "the body is no JSON"),
        (b'{"prompt": "\xff"}', None, "the body is no JSON"),
        (b'{"prompt": ' + b"[" * 100_000, None, "recursion limit"),
        (b"[1]", None, "the body is [1]; input should be an object"),
        (b"{}", "prompt", "prompt is missing"),
        (b'{"prompt": "x", "flavour": 1}', "flavour", "'flavour' is no field here; allowed: "),
        (b'{"prompt": "x", "kv": {"budgie": 1}}', "kv.budgie", "'budgie' is no field here; allowed: budget"),
        (b'{"prompt": "x", "max_tokens": "3"}', "max_tokens", "max_tokens is '3'"),
        (b'{"prompt": "x", "temperature": NaN}', "temperature", "finite"),
        (b'{"prompt": 5}', "prompt", "allowed: a text, token ids"),
        (b'{"prompt": []}', "prompt", "allowed: a text, token ids"),
        (b'{"prompt": [[]], "max_tokens": -1}', None, "max_tokens is -1"),
        (b'{"prompt": ["a", 5]}', "prompt", "neither a text nor a list of token ids"),
        (b'{"prompt": [5, 99999999999]}', None, "99999999999"),
        (b'{"prompt": "\\ud800"}', None, "the body is no JSON"),
        (b'{"prompt": [' + b'"a",' * 128 + b'"a"]}', "prompt", "allowed: at most 128"),
    ],
    ids=lambda one: repr(one)[:40],
)
def test_a_body_that_cannot_be_used(gateway: RunningGateway, body: bytes, param: str | None, said: str) -> None:
    reply = gateway.ask("POST", "/v1/completions", body)
    assert reply.status == 400
    assert (reply.error["type"], reply.error["param"]) == ("invalid_request_error", param)
    assert said in reply.error["message"]


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": "robot", "content": "x"}, "'system', 'developer', 'user', 'assistant' or 'tool'"),
        ({"role": "user"}, "content is missing; it must be given"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "a part of type 'image_url'"),
        ({"role": "user", "content": "x", "mood": "good"}, "'mood' is no field here"),
    ],
)
def test_a_message_that_cannot_be_used(gateway: RunningGateway, message: Any, said: str) -> None:
    reply = gateway.ask("POST", "/v1/chat/completions", {"messages": [message]})
    assert reply.status == 400
    assert said in reply.error["message"]


def test_paths_and_methods_that_there_are_none_of(gateway: RunningGateway) -> None:
    reply = gateway.get("/v1/embeddings")
    assert (reply.status, reply.error["type"]) == (404, "not_found_error")
    assert "GET /v1/embeddings" in reply.error["message"]
    reply = gateway.get("/v1/completions")
    assert (reply.status, reply.headers["allow"]) == (405, "POST")


def test_a_defect_is_a_500_that_tells_nothing_of_the_inside(
    gateway: RunningGateway, prefill: FakePrefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> Any:
        raise RuntimeError("secret detail")

    monkeypatch.setattr("spectrumkv.gateway.answers.writer.usage_of", broken)
    reply = gateway.complete()
    assert reply.status == 500
    assert "secret" not in reply.body.decode()
    assert reply.error["type"] == "server_error"
    assert "secret" not in str(gateway.complete(stream=True, stream_options={"include_usage": True}).events[-1])
