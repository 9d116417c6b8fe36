"""`kv.map` in the body: `usage.kv.map` at the end, with the texts of the prompt's tokens."""

from collections.abc import Iterator
from typing import Any

import pytest

from spectrumkv.v1 import prefill_pb2
from tests.client.fake_servers import FakePrefill, finished, token
from tests.gateway.running import RunningGateway

TEXTS, BITS = ["Why", " so", "?"], [16.0, 4.25, 3.3333]


def answer(request: prefill_pb2.GenerateRequest, context: Any) -> Iterator[prefill_pb2.GenerateResponse]:
    tokens = [prefill_pb2.PromptToken(token_id=place, text=text) for place, text in enumerate(TEXTS)]
    if request.echo:
        yield prefill_pb2.GenerateResponse(prompt_tokens=prefill_pb2.PromptTokens(tokens=tokens))
    yield token(0, "Blue", ends="STOP")
    end = finished(1)
    if request.kv_map:
        end.finished.kv_map.bits.extend(BITS)
    if request.kv_map == prefill_pb2.KV_MAP_DETAIL_LAYERS:
        end.finished.kv_map.layers.extend(prefill_pb2.KvMapLayer(bits=[1.0 * layer] * 3) for layer in range(2))
    yield end


@pytest.fixture(autouse=True)
def _answers(prefill: FakePrefill) -> None:
    prefill.answer = answer


def test_a_whole_answer(gateway: RunningGateway) -> None:
    said = gateway.complete(kv={"map": True}).json
    assert said["choices"][0]["text"] == "Blue"
    assert said["usage"]["kv"]["map"] == {"texts": TEXTS, "bits": [16.0, 4.25, 3.333]}


def test_layer_by_layer(gateway: RunningGateway) -> None:
    said = gateway.chat(kv={"map": "layers"}).json
    assert said["choices"][0]["message"]["content"] == "Blue"
    assert said["usage"]["kv"]["map"]["layers"] == [[0.0] * 3, [1.0] * 3]


def test_a_stream_has_it_in_its_last_event(gateway: RunningGateway) -> None:
    events = gateway.complete(stream=True, stream_options={"include_usage": True}, kv={"map": True}).events
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == "Blue"
    assert events[-1]["usage"]["kv"]["map"]["texts"] == TEXTS
    assert not any(event.get("usage") for event in events[:-1])


def test_several_prompts_have_a_map_each(gateway: RunningGateway) -> None:
    said = gateway.complete(prompt=["a", "b"], kv={"map": True}).json
    assert [one["map"]["texts"] for one in said["usage"]["kv"]] == [TEXTS, TEXTS]


@pytest.mark.parametrize("kv", [None, {}, {"map": False}, {"map": None}])
def test_none_is_asked_for_unless_the_request_does(
    gateway: RunningGateway, prefill: FakePrefill, kv: dict[str, Any] | None
) -> None:
    assert "map" not in gateway.complete(kv=kv).json["usage"]["kv"]
    assert (prefill.requests[0].kv_map, prefill.requests[0].echo) == (0, False)


def test_what_cannot_be_asked_for(gateway: RunningGateway, prefill: FakePrefill) -> None:
    reply = gateway.complete(kv={"map": "rows"})
    assert (reply.status, reply.error["param"]) == (400, "kv.map")
    assert reply.error["message"] == "map is 'rows'; allowed: true, false and \"layers\""
    reply = gateway.complete(stream=True, kv={"map": True})
    assert (reply.status, reply.error["param"]) == (400, "kv.map")
    assert reply.error["message"] == "map is a part of usage; set stream_options.include_usage to true"
    assert prefill.requests == []
