import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from prometheus_client import CollectorRegistry

from spectrumkv.bench.models.synthetic_prompt import synthetic_basis
from spectrumkv.common.errors import CancelledError, InvalidArgumentError, NotFiniteError
from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.kv.codecs.base import codecs
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.tiers import Tier
from spectrumkv.common.kv.wire import ChunkReader, ChunkTotals, KvChunk
from spectrumkv.common.rpc.decode_stream import Request, serialized_bytes
from spectrumkv.common.service.config import PrefillConfig
from spectrumkv.common.telemetry.metrics import Metrics
from spectrumkv.prefill_server.transfer.pipeline import FirstToken, KvPipeline
from spectrumkv.prefill_server.transfer.plan import KvPlan
from spectrumkv.prefill_server.verdict import ProbeVerdict
from spectrumkv.v1 import decode_pb2, prefill_pb2

GEOMETRY = KvGeometry(layers=3, kv_heads=2, head_dim=8, native_dtype=torch.float32)
TOKENS = 30
VERDICT = ProbeVerdict.from_flag("on", GEOMETRY.layers)


def plan(**options: object) -> KvPlan:
    return KvPlan.resolve(prefill_pb2.KvOptions(**options), PrefillConfig(), VERDICT, seed=3)


def capture(layer: int, tokens: int = TOKENS) -> LayerCapture:
    generator = torch.Generator().manual_seed(layer)
    keys, values = torch.randn(2, GEOMETRY.kv_heads, tokens, GEOMETRY.head_dim, generator=generator)
    queries = torch.randn(4, 5, GEOMETRY.head_dim, generator=generator)
    return LayerCapture(queries, keys, values, 0.3, None, None, layer)


def kind(message: Request) -> str:
    return "chunk" if isinstance(message, KvChunk) else str(message.WhichOneof("message"))


def pipeline(chosen: KvPlan, chunk_bytes: int = 1024) -> KvPipeline:
    begin = decode_pb2.Begin(prompt_token_ids=range(TOKENS))
    return KvPipeline(begin, chosen, GEOMETRY, chunk_bytes, Metrics(CollectorRegistry()))


def received(messages: list[Request]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a decode worker makes of the messages: keys, values and tiers, layer by layer."""
    shape = (GEOMETRY.layers, GEOMETRY.kv_heads, TOKENS, GEOMETRY.head_dim)
    keys, values = torch.zeros(shape), torch.zeros(shape)
    tiers = torch.zeros(GEOMETRY.layers, TOKENS, dtype=torch.uint8)
    reader = ChunkReader(GEOMETRY.layers, TOKENS)
    for message in messages[1:-1]:
        assert isinstance(message, KvChunk)
        for segment in reader.read(message):
            span = slice(segment.first_token, segment.first_token + segment.tiers.numel())
            codecs.get("absmax").decode(
                segment.body, segment.tiers, keys[segment.layer, :, span], values[segment.layer, :, span], GEOMETRY
            )
            tiers[segment.layer, span] = segment.tiers
    end = messages[-1].end
    reader.finish(ChunkTotals(end.chunks, end.payload_bytes, end.digest))
    return keys, values, tiers


def run(one: KvPipeline) -> list[Request]:
    for layer in range(GEOMETRY.layers):
        one.put_layer(capture(layer))
    one.put_first_tokens(FirstToken(42, finished=False))
    return list(one.messages())


@pytest.mark.parametrize("chunk_bytes", [1024, 1 << 20])
@pytest.mark.parametrize("scope", ["layer", "model"])
def test_what_is_sent_is_the_kv_at_its_tiers(scope: str, chunk_bytes: int) -> None:
    one = pipeline(plan(policy="greedy", budget=0.7, scope=scope), chunk_bytes)
    messages = run(one)
    assert kind(messages[0]) == "begin"
    assert messages[-1].end.first_token_id == 42
    keys, values, tiers = received(messages)
    for layer in range(GEOMETRY.layers):
        sent = capture(layer)
        for states, arrived in ((sent.keys, keys[layer]), (sent.values, values[layer])):
            error = (states - arrived).abs().amax(dim=(0, 2)) / states.abs().amax()
            assert error[tiers[layer] == Tier.FP16].max() < 1e-3
            assert error[tiers[layer] == Tier.INT8].max() < 1e-2
    assert bool((tiers == tiers[0]).all()) == (scope == "model")
    assert one.sent.message_bytes == sum(serialized_bytes(message) for message in messages)
    assert sum(one.sent.tier_tokens.values()) == GEOMETRY.layers * TOKENS


def test_large_layers_are_cut_into_segments_and_counted_by_tier() -> None:
    tokens = 40000
    one = KvPipeline(
        decode_pb2.Begin(), plan(policy="greedy", budget=0.9), GEOMETRY, 1 << 18, Metrics(CollectorRegistry())
    )
    for layer in range(GEOMETRY.layers):
        one.put_layer(capture(layer, tokens))
    one.put_first_tokens(FirstToken(1, finished=False))
    chunks = [message for message in one.messages() if isinstance(message, KvChunk)]
    assert len(chunks) > GEOMETRY.layers
    # FP16: 2 bytes for each of 8 elements of 2 heads, keys and values. INT8: 1 byte, and 2 for each scale.
    fp16, int8 = one.sent.tier_tokens[Tier.FP16], one.sent.tier_tokens[Tier.INT8]
    assert (fp16, int8) == (GEOMETRY.layers * 32000, GEOMETRY.layers * 8000)
    assert one.sent.tier_bytes[Tier.FP16] == fp16 * 2 * 2 * 8 * 2
    assert one.sent.tier_bytes[Tier.INT8] == int8 * 2 * 2 * (8 + 2)
    # Neither clock is exact.
    assert 0 < one.sent.coder_seconds <= one.sent.encode_seconds + 0.01


def test_layers_leave_before_the_next_one_is_computed() -> None:
    one = pipeline(plan(policy="fp16"), chunk_bytes=1)
    messages: Iterator[Request] = one.messages()
    next(messages)
    for layer in range(GEOMETRY.layers):
        one.put_layer(capture(layer))
        chunk = next(messages)
        assert isinstance(chunk, KvChunk)
        assert chunk.sequence == layer
    one.put_first_tokens(FirstToken(1, finished=False))
    assert kind(next(messages)) == "end"


def test_chunks_of_a_prompt_leave_before_the_next_one_is_computed() -> None:
    chosen = plan(policy="fp16")
    assert chosen.streams_chunks
    assert not plan(policy="greedy", budget=0.5).streams_chunks
    assert not plan(policy="fp16", scope="model").streams_chunks
    one = pipeline(chosen, chunk_bytes=1)
    iterator: Iterator[Request] = one.messages()
    messages = [next(iterator)]
    whole = [capture(layer) for layer in range(GEOMETRY.layers)]
    for first in (0, 17):
        for layer in whole:
            shown = layer if first else replace(layer, keys=layer.keys[:, :17], values=layer.values[:, :17])
            one.put_layer(shown.since(first))
            messages.append(next(iterator))
            assert isinstance(messages[-1], KvChunk)
    one.put_first_tokens(FirstToken(1, finished=False))
    messages += iterator
    keys, values, _ = received(messages)
    for layer, expected in enumerate(whole):
        torch.testing.assert_close(keys[layer], expected.keys, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(values[layer], expected.values, rtol=1e-3, atol=1e-3)


def test_cancelling_ends_the_messages_and_the_forward_pass() -> None:
    one = pipeline(plan(policy="fp16"))
    collected: list[Request] = []
    reading = threading.Event()

    def read() -> None:
        for message in one.messages():
            collected.append(message)
            reading.set()

    thread = threading.Thread(target=read)
    thread.start()
    reading.wait()
    one.put_layer(capture(0))
    one.cancel()
    thread.join(timeout=10)
    assert not thread.is_alive()
    assert not any(kind(message) == "end" for message in collected)
    with pytest.raises(CancelledError):
        one.put_layer(capture(1))


def test_kv_that_cannot_be_coded_ends_the_stream_with_the_reason() -> None:
    one = pipeline(plan(policy="uniform-int8"))
    bad = capture(0)
    bad.keys[0, 3, 1] = torch.inf
    one.put_layer(bad)
    with pytest.raises(NotFiniteError, match="keys of 1 of"):
        list(one.messages())
    assert isinstance(one.failure, NotFiniteError)


def test_policies_and_codecs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="policy 'native' is written by codec 'native', not by 'absmax'"):
        plan(policy="native", codec="absmax")
    with pytest.raises(InvalidArgumentError, match="codec 'native' cannot write policy 'greedy': it only has native"):
        plan(policy="greedy", codec="native")


def test_what_is_sent_hangs_neither_on_the_id_nor_on_the_seed() -> None:
    basis = synthetic_basis(GEOMETRY)
    options = prefill_pb2.KvOptions(policy="spectral", budget=0.4)
    chosen = KvPlan.resolve(options, PrefillConfig(), VERDICT, seed=3, basis=basis)
    sent = []
    for request_id, seed in (("", 0), ("0" * 32, 2**63), ("é" * 60, 7)):
        begin = decode_pb2.Begin(request_id=request_id, prompt_token_ids=range(TOKENS))
        begin.sampling.seed = seed
        one = KvPipeline(begin, chosen, GEOMETRY, 1 << 20, Metrics(CollectorRegistry()))
        sent.append([message.payload for message in run(one) if isinstance(message, KvChunk)])
        assert one.sent.message_bytes <= 0.4 * GEOMETRY.fp16_bytes(TOKENS)
    assert sent[0] == sent[1] == sent[2]
