"""Bodies of the largest size are refused at their first fault, and hold up nobody else."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from spectrumkv.gateway.api import fields
from spectrumkv.gateway.api.chat import ChatFields
from spectrumkv.gateway.api.completion import CompletionFields
from spectrumkv.gateway.api.errors import HttpError
from spectrumkv.gateway.api.fields import RequestFields
from spectrumkv.gateway.api.tokens import DetokenizeFields, TokenizeFields
from spectrumkv.gateway.http import exchange
from spectrumkv.gateway.routes import body
from tests.client.fake_servers import FakePrefill
from tests.gateway.running import WAIT_SECONDS, RunningGateway
from tests.waiting import until

BODY_BYTES = 512 << 10
USER = b'{"role":"user","content":"a"}'


def filled(before: bytes, entry: bytes, after: bytes) -> bytes:
    """A large body that has the same entry again and again."""
    entries = max(BODY_BYTES // (len(entry) + 1), fields.MAX_OBJECTS)
    return before + b",".join([entry] * entries) + after


@pytest.mark.parametrize(
    ("kind", "before", "entry", "after", "param"),
    [
        (ChatFields, b'{"messages":[', b"{}", b"]}", "messages.0.role"),
        (ChatFields, b'{"messages":[', b"1", b"]}", "messages.0"),
        (ChatFields, b'{"messages":[{"role":"user","content":[', b"{}", b"]}]}", "messages.0.content"),
        (ChatFields, b'{"messages":[{"role":"assistant","tool_calls":[', b"1", b"]}]}", "messages.0.tool_calls.0"),
        (ChatFields, b'{"messages":[' + USER + b'],"tools":[', b"{}", b"]}", "tools.0.type"),
        (TokenizeFields, b'{"messages":[', b"{}", b"]}", "messages.0.role"),
        (TokenizeFields, b'{"prompt":"x","tools":[', b"1", b"]}", "tools.0"),
        (DetokenizeFields, b'{"tokens":[', b'""', b"]}", "tokens.0"),
        (CompletionFields, b'{"prompt":[', b"[]", b"]}", "prompt"),
        (CompletionFields, b'{"prompt":"x","stop_token_ids":[', b'""', b"]}", "stop_token_ids.0"),
        (CompletionFields, b'{"prompt":"x","bad_words":[', b"1", b"]}", "bad_words.0"),
        (
            CompletionFields,
            b'{"prompt":"x","structured_outputs":{"choice":[',
            b"1",
            b"]}}",
            "structured_outputs.choice.0",
        ),
    ],
)
def test_of_a_million_faults_the_first_is_reported(
    kind: type[RequestFields], before: bytes, entry: bytes, after: bytes, param: str
) -> None:
    with pytest.raises(ValidationError) as raised:
        kind.read(filled(before, entry, after))
    # An object may lack several fields.
    assert raised.value.error_count() <= 2
    assert HttpError.of_body(raised.value).param == param


def test_a_list_of_wrong_stop_strings_makes_one_error_for_each_of_its_types() -> None:
    with pytest.raises(ValidationError) as raised:
        CompletionFields.read(filled(b'{"prompt":"x","stop":[', b"1", b"]}"))
    assert raised.value.error_count() == 2


def test_too_many_biases_are_not_read() -> None:
    biases = b",".join(b'"%d":""' % token for token in range(1025))
    with pytest.raises(ValidationError) as raised:
        CompletionFields.read(b'{"prompt":"x","logit_bias":{' + biases + b"}}")
    assert HttpError.of_body(raised.value).message == "logit_bias has 1025 tokens; allowed: at most 1024"


@pytest.mark.parametrize(
    "sent",
    [
        filled(b'{"messages":[', USER, b"]}"),
        filled(
            b'{"messages":[{"role":"assistant","tool_calls":[',
            b'{"id":"a","type":"function","function":{"name":"b","arguments":""}}',
            b"]}]}",
        ),
        filled(b'{"messages":[' + USER + b'],"tools":[', b'{"type":"function","function":{"name":"b"}}', b"]}"),
    ],
    ids=["messages", "calls", "tools"],
)
def test_a_body_has_so_many_objects_and_no_more(sent: bytes) -> None:
    with pytest.raises(ValidationError) as raised:
        ChatFields.read(sent)
    assert raised.value.error_count() == 1
    said = HttpError.of_body(raised.value).message
    assert said == "the body has more than 16,384 messages, calls and tools; send fewer"


def test_as_many_objects_as_are_allowed() -> None:
    messages = b",".join([USER] * (fields.MAX_OBJECTS - 1))
    assert len(ChatFields.read(b'{"messages":[' + messages + b"]}").messages) == fields.MAX_OBJECTS - 1


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Bodies are read once this is set."""
    may_go = threading.Event()
    read = CompletionFields.read.__func__  # type: ignore[attr-defined]

    def wait_and_read(kind: type[RequestFields], sent: bytes) -> Any:
        assert may_go.wait(WAIT_SECONDS)
        return read(kind, sent)

    monkeypatch.setattr(CompletionFields, "read", classmethod(wait_and_read))
    monkeypatch.setattr(body, "LARGE_BYTES", 0)
    yield may_go
    may_go.set()


def test_others_are_served_while_a_large_body_is_read(
    gateway: RunningGateway, prefill: FakePrefill, held: threading.Event
) -> None:
    answers = []
    large = threading.Thread(target=lambda: answers.append(gateway.complete(model="m")))
    large.start()
    assert gateway.get("/health").status == 200
    assert gateway.get("/v1/models").status == 200
    assert not answers
    held.set()
    large.join(WAIT_SECONDS)
    assert answers[0].status == 200


def test_a_refusal_by_a_route_is_counted_as_what_it_is(
    gateway: RunningGateway, caplog: pytest.LogCaptureFixture
) -> None:
    assert gateway.get("/v1/models/other").status == 404
    until(lambda: gateway.counted("/v1/models/{name:path}", 404) == 1)
    assert not [one for one in caplog.records if one.exc_info]


def test_bodies_that_run_are_bounded_together(
    gateway: RunningGateway, prefill: FakePrefill, held: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "MAX_HELD_BYTES", 1000)
    answers = []
    first = threading.Thread(target=lambda: answers.append(gateway.complete(prompt="x" * 700)))
    first.start()
    running = "spectrumkv_gateway_requests_running"
    until(lambda: gateway.metrics.registry.get_sample_value(running) == 1)
    refused = gateway.complete(prompt="x" * 700)
    assert (refused.status, refused.headers["retry-after"]) == (429, "1")
    assert "at most 1000; try again later" in refused.error["message"]
    assert gateway.get("/v1/models").status == 200
    held.set()
    first.join(WAIT_SECONDS)
    assert answers[0].status == 200
    assert gateway.complete(prompt="x" * 700).status == 200
