"""Who calls: tokens, request ids, traces, origins; and callers that go away."""

import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.security.tokens import TOKEN_VARIABLE
from tests.client.fake_servers import FakePrefill, finished, token
from tests.gateway.running import WAIT_SECONDS, RunningGateway, running_gateway
from tests.waiting import until

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
ALICE, PREFILL = "alice-0123456789abcdef", "prefill-0123456789abcdef"


def recorded(prefill: FakePrefill) -> list[dict[str, str]]:
    """The metadata of each call from now on."""
    seen: list[dict[str, str]] = []

    def answer(request: Any, context: Any) -> Any:
        seen.append(dict(context.invocation_metadata()))
        yield token(0, "a")
        yield finished(1)

    prefill.answer = answer
    return seen


def test_a_callers_token_goes_on_to_prefill(
    prefill: FakePrefill, gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, PREFILL)
    seen = recorded(prefill)
    with running_gateway(prefill.address) as gateway:
        gateway.ask("POST", "/v1/completions", {"prompt": "x"}, {"Authorization": f"Bearer {ALICE}"})
        gateway.complete()
    # Nobody gets the gateway's own.
    assert [one.get("authorization") for one in seen] == [f"Bearer {ALICE}", None]


def test_the_gateway_checks_tokens_and_brings_its_own(prefill: FakePrefill, tmp_path: Path) -> None:
    accepted, own = tmp_path / "accepted", tmp_path / "own"
    accepted.write_text(f"alice:{ALICE}\n")
    own.write_text(PREFILL)
    seen = recorded(prefill)
    with running_gateway(prefill.address, token_file=str(accepted), prefill_token_file=str(own)) as gateway:
        body = {"prompt": "x"}
        reply = gateway.ask("POST", "/v1/completions", body, {"Authorization": f"bearer {ALICE}"})
        assert reply.status == 200
        for headers in ({}, {"Authorization": "Basic abc"}, {"Authorization": f"Bearer {ALICE}x"}):
            reply = gateway.ask("POST", "/v1/completions", body, headers)
            assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
            assert reply.headers["www-authenticate"] == "Bearer"
        assert gateway.get("/v1/models").status == 401
        assert gateway.get("/health").status == 200
        assert gateway.get("/metrics").status == 200
    assert [one.get("authorization") for one in seen] == [f"Bearer {PREFILL}"]


@pytest.mark.parametrize("value", ["Bearer " + "a" * 2000, "Bearer \xe9"], ids=["long", "latin"])
def test_a_token_that_cannot_be_sent_on(gateway: RunningGateway, value: str) -> None:
    reply = gateway.ask("POST", "/v1/completions", {"prompt": "x"}, {"Authorization": value})
    assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")


def test_options_that_would_lend_a_token_or_leave_the_machine() -> None:
    for options, said in (
        ({"prefill_token_file": "/x"}, "would lend its token"),
        ({"listen": "0.0.0.0:0"}, "is not encrypted"),
        ({"prefill_tls_cert": "/x"}, "--prefill-tls-cert is given without --prefill-tls-key"),
        ({"tls_cert": "/x"}, "without --tls-key"),
    ):
        with pytest.raises(InvalidArgumentError, match=said), running_gateway("127.0.0.1:1", **options):
            pass


def test_request_ids_and_traces_pass_through(gateway: RunningGateway, prefill: FakePrefill) -> None:
    seen = recorded(prefill)
    headers = {"x-request-id": "mine", "traceparent": TRACEPARENT, "tracestate": "a=b"}
    reply = gateway.ask("POST", "/v1/completions", {"prompt": "x"}, headers)
    assert reply.headers["x-request-id"] == "mine"
    assert reply.json["id"] == "cmpl-mine"
    assert prefill.requests[0].request_id == "mine"
    assert (seen[0]["traceparent"], seen[0]["tracestate"]) == (TRACEPARENT, "a=b")
    drawn = gateway.complete()
    assert drawn.headers["x-request-id"] == prefill.requests[1].request_id
    assert "traceparent" not in seen[1]
    reply = gateway.ask("POST", "/v1/completions", {"prompt": "x"}, {"x-request-id": "x" * 129})
    assert (reply.status, reply.error["param"]) == (400, None)
    assert gateway.complete(request_id="its-own").json["id"] == "cmpl-its-own"


def test_pages_of_other_origins_call_only_where_they_are_named(prefill: FakePrefill) -> None:
    asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    with running_gateway(prefill.address) as gateway:
        assert "access-control-allow-origin" not in gateway.get("/health", **asked).headers
        assert gateway.ask("OPTIONS", "/v1/completions", headers=asked).status == 405
    with running_gateway(prefill.address, cors_origins="https://a.example, https://b.example") as gateway:
        assert gateway.get("/health", **asked).headers["access-control-allow-origin"] == "https://a.example"
        assert gateway.ask("OPTIONS", "/v1/completions", headers=asked).status == 200
        stranger = asked | {"Origin": "https://c.example"}
        assert "access-control-allow-origin" not in gateway.get("/health", **stranger).headers


@pytest.mark.parametrize("when", ["before the first token", "in a stream", "of a whole answer"])
def test_a_caller_that_goes_away_cancels_its_request_within_a_second(
    gateway: RunningGateway, prefill: FakePrefill, when: str
) -> None:
    running = threading.Event()

    def answer(request: Any, context: Any) -> Any:
        if when != "before the first token":
            yield token(0, "a")
        running.set()
        prefill.ended.wait(WAIT_SECONDS)

    prefill.answer = answer
    with closing(gateway.socket()) as connection:
        stream = b"false" if when == "of a whole answer" else b"true"
        body = b'{"prompt": "x", "model": "m", "stream": ' + stream + b"}"
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
        connection.sendall(head + body)
        assert running.wait(WAIT_SECONDS)
        if when == "in a stream":
            assert b"200 OK" in connection.recv(4096)
    left = time.monotonic()
    assert prefill.ended.wait(WAIT_SECONDS)
    assert time.monotonic() - left < 1.0
    until(lambda: gateway.counted("/v1/completions", 499) == 1)


def test_what_prometheus_reads(gateway: RunningGateway) -> None:
    gateway.complete(stream=True)
    reply = gateway.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=")
    text = reply.body.decode()
    assert 'spectrumkv_gateway_requests_total{route="/v1/completions",status="200"} 1.0' in text
    assert "spectrumkv_gateway_time_to_first_token_seconds_count 1.0" in text
    assert "spectrumkv_gateway_requests_running 0.0" in text
    assert "spectrumkv_gateway_connections 1.0" in text
