"""A prompt in codec fixed_rate from the GPU of prefill to the slots of decode, both simulated."""

from unittest.mock import patch

import pytest
import torch
from prometheus_client import CollectorRegistry

from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.kv.codecs.calibrated.basis import CalibratedBasis
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.wire import KvChunk
from spectrumkv.common.rpc.decode_stream import Request, serialized_bytes
from spectrumkv.common.service.config import PrefillConfig
from spectrumkv.common.telemetry.metrics import Metrics
from spectrumkv.decode_server.kv_pool import KvPool
from spectrumkv.decode_server.receiver import KvReceiver
from spectrumkv.prefill_server.transfer import pipeline as kv_pipeline
from spectrumkv.prefill_server.transfer.pipeline import FirstToken, KvPipeline
from spectrumkv.prefill_server.transfer.plan import KvPlan
from spectrumkv.prefill_server.verdict import ProbeVerdict
from spectrumkv.v1 import decode_pb2, prefill_pb2
from tests.common.kv.codecs.spectral_prompts import basis_of, capture
from tests.simulated_gpu import GPU, simulated_gpu

GEOMETRY = KvGeometry(layers=2, kv_heads=1, head_dim=6, native_dtype=torch.float32)
TOKENS = 16


def captures(basis: CalibratedBasis, device: torch.device) -> list[LayerCapture]:
    made = []
    for layer in range(GEOMETRY.layers):
        seen = capture(basis, layer, TOKENS)
        states = (one.to(device) for one in (seen.queries, seen.keys, seen.values))
        made.append(LayerCapture(*states, seen.scaling, None, None, layer))
    return made


def sent(plan: KvPlan, layers: list[LayerCapture], device: torch.device) -> list[Request]:
    begin = decode_pb2.Begin(prompt_token_ids=range(TOKENS))
    pipeline = KvPipeline(begin, plan, GEOMETRY, 1 << 20, Metrics(CollectorRegistry()), device)
    for seen in layers:
        pipeline.put_layer(seen)
    pipeline.put_first_tokens(FirstToken(42, finished=False))
    # Work of a GPU that is none is done on this thread only.
    with patch.object(kv_pipeline, "PrefetchIterator", lambda items, depth, name: items):
        return list(pipeline.messages())


def received(messages: list[Request], plan: KvPlan, device: torch.device) -> torch.Tensor:
    memory = 2 * TOKENS * GEOMETRY.layers * GEOMETRY.native_bytes_per_token_layer
    pool = KvPool(GEOMETRY, memory, device, Metrics(CollectorRegistry()))
    with pool.reserve(TOKENS) as allocation:
        metrics = Metrics(CollectorRegistry())
        with KvReceiver(pool, allocation, plan.decoder(GEOMETRY), TOKENS, metrics) as receiver:
            for message in messages:
                if isinstance(message, KvChunk):
                    receiver.accept(message, serialized_bytes(message))
            receiver.finish(messages[-1].end)
        states = [
            torch.stack([allocation.keys(layer, 0, TOKENS).cpu(), allocation.values(layer, 0, TOKENS).cpu()])
            for layer in range(GEOMETRY.layers)
        ]
    return torch.stack(states)


@pytest.mark.slow
def test_what_leaves_one_gpu_arrives_on_another_as_on_a_cpu() -> None:
    basis, cpu = basis_of(GEOMETRY), torch.device("cpu")
    options = prefill_pb2.KvOptions(policy="spectral", codec="fixed_rate", budget=0.9)
    plan = KvPlan.resolve(options, PrefillConfig(), ProbeVerdict.from_flag("on", GEOMETRY.layers), 3, basis)
    with simulated_gpu():
        messages = sent(plan, captures(basis, GPU), GPU)
        on_gpu = received(messages, plan, GPU)
    messages_of_cpu = sent(plan, captures(basis, cpu), cpu)
    taken, taken_by_cpu = (sum(map(serialized_bytes, sending)) for sending in (messages, messages_of_cpu))
    assert taken == pytest.approx(taken_by_cpu, rel=0.02)
    torch.testing.assert_close(on_gpu, received(messages, plan, cpu), rtol=1e-4, atol=1e-4)
    # Errors are those that a CPU's messages leave.
    exact = torch.stack([torch.stack([one.keys, one.values]) for one in captures(basis, cpu)])
    of_cpu = received(messages_of_cpu, plan, cpu)
    error, error_of_cpu = ((one - exact).square().mean() for one in (on_gpu, of_cpu))
    assert float(error) <= 1.2 * float(error_of_cpu)
