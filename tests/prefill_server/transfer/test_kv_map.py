"""The map of a prompt's precision adds up to what left, and is no work where nobody asks for it."""

import pytest
from prometheus_client import CollectorRegistry

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.kv.codecs.absmax import AbsmaxCodec
from spectrumkv.common.rpc.decode_stream import serialize_request
from spectrumkv.common.telemetry.metrics import Metrics
from spectrumkv.prefill_server.transfer.kv_map import MOST_LAYER_NUMBERS, KvMap, check_detail
from spectrumkv.prefill_server.transfer.pipeline import KvPipeline
from spectrumkv.prefill_server.transfer.plan import KvPlan
from spectrumkv.v1 import decode_pb2, prefill_pb2
from tests.prefill_server.transfer.test_pipeline import GEOMETRY, TOKENS, pipeline, plan, run


def mapped(chosen: KvPlan, by_layer: bool) -> KvPipeline:
    begin = decode_pb2.Begin(prompt_token_ids=range(TOKENS))
    kv_map = KvMap(chosen, GEOMETRY, TOKENS, by_layer)
    return KvPipeline(begin, chosen, GEOMETRY, 1024, Metrics(CollectorRegistry()), kv_map=kv_map)


@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("by_layer", [False, True])
def test_the_mean_agrees_with_the_bytes_that_left(scope: str, by_layer: bool) -> None:
    one = mapped(plan(policy="greedy", budget=0.6, scope=scope), by_layer)
    run(one)
    found = one.kv_map.to_proto()
    elements = GEOMETRY.layers * GEOMETRY.elements_per_token_layer
    assert len(found.bits) == TOKENS
    assert sum(found.bits) * elements / 8 == pytest.approx(sum(one.sent.tier_bytes.values()), rel=1e-6)
    assert len(found.layers) == (GEOMETRY.layers if by_layer else 0)
    for token, bits in enumerate(found.bits if by_layer else ()):
        of_layers = [layer.bits[token] for layer in found.layers]
        assert sum(of_layers) / GEOMETRY.layers == pytest.approx(bits)
        assert scope == "layer" or len(set(of_layers)) == 1


def test_where_nobody_asks_no_token_is_counted_and_the_same_bytes_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = plan(policy="greedy", budget=0.6)
    with_map = [serialize_request(message) for message in run(mapped(chosen, True))]
    calls = []
    monkeypatch.setattr(AbsmaxCodec, "bytes_of_tokens", lambda *arguments: calls.append(arguments))
    one = pipeline(chosen)
    without = [serialize_request(message) for message in run(one)]
    assert one.kv_map is None
    assert calls == []
    assert [bytes(message) for message in without] == [bytes(message) for message in with_map]


def test_what_cannot_be_asked_for() -> None:
    with pytest.raises(InvalidArgumentError, match=r"kv_map is 7; allowed: 0 \(KV_MAP_DETAIL_UNSPECIFIED\), 1"):
        check_detail(7, 2, 2)
    check_detail(prefill_pb2.KV_MAP_DETAIL_LAYERS, 2, MOST_LAYER_NUMBERS // 2)
    check_detail(prefill_pb2.KV_MAP_DETAIL_TOKENS, 2, MOST_LAYER_NUMBERS)
    with pytest.raises(InvalidArgumentError, match="would have 1048578 numbers, for 524289 tokens in 2 layers"):
        check_detail(prefill_pb2.KV_MAP_DETAIL_LAYERS, 2, MOST_LAYER_NUMBERS // 2 + 1)
