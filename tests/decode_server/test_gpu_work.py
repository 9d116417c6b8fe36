"""What decode asks of a GPU for each message of KV: launches, and waits of the host."""

import pytest
import torch
from prometheus_client import CollectorRegistry

from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.wire import KvChunk
from spectrumkv.common.rpc.decode_stream import Request, serialized_bytes
from spectrumkv.common.service.config import PrefillConfig
from spectrumkv.common.telemetry.metrics import Metrics
from spectrumkv.decode_server.kv_pool import KvPool
from spectrumkv.decode_server.receiver import KvReceiver
from spectrumkv.prefill_server.transfer.pipeline import FirstToken, KvPipeline
from spectrumkv.prefill_server.transfer.plan import KvPlan
from spectrumkv.prefill_server.verdict import ProbeVerdict
from spectrumkv.v1 import decode_pb2, prefill_pb2
from tests.simulated_gpu import GPU, GpuWork, simulated_gpu

GEOMETRY = KvGeometry(layers=2, kv_heads=2, head_dim=32, native_dtype=torch.bfloat16)
TOKENS, SLOTS = 90, 128
# Bodies and tables in one copy, and one launch that writes slots.
LAUNCHES = 2


def plan(policy: str, budget: float) -> KvPlan:
    options = prefill_pb2.KvOptions(policy=policy, budget=budget)
    return KvPlan.resolve(options, PrefillConfig(), ProbeVerdict.from_flag("on", GEOMETRY.layers), seed=3)


def sent(chosen: KvPlan, chunk_bytes: int) -> list[Request]:
    """The messages of a prompt."""
    begin = decode_pb2.Begin(prompt_token_ids=range(TOKENS))
    pipeline = KvPipeline(begin, chosen, GEOMETRY, chunk_bytes, Metrics(CollectorRegistry()))
    for layer in range(GEOMETRY.layers):
        generator = torch.Generator().manual_seed(layer)
        shape = (2, GEOMETRY.kv_heads, TOKENS, GEOMETRY.head_dim)
        keys, values = torch.randn(shape, generator=generator).bfloat16()
        queries = torch.randn(4, 8, GEOMETRY.head_dim, generator=generator).bfloat16()
        pipeline.put_layer(LayerCapture(queries, keys, values, 0.2, None, None, layer))
    pipeline.put_first_tokens(FirstToken(42, finished=False))
    return list(pipeline.messages())


def received(messages: list[Request], chosen: KvPlan, device: torch.device, work: GpuWork) -> torch.Tensor:
    """Keys and values in the slots, each message after another, and what they ask of the GPU."""
    memory = SLOTS * GEOMETRY.layers * GEOMETRY.native_bytes_per_token_layer
    pool = KvPool(GEOMETRY, memory, device, Metrics(CollectorRegistry()))
    for states in (pool.keys, pool.values):
        states.fill_(torch.nan)
    metrics = Metrics(CollectorRegistry())
    with pool.reserve(7), pool.reserve(TOKENS + 3) as allocation:
        with KvReceiver(pool, allocation, chosen.decoder(GEOMETRY), TOKENS, metrics) as receiver:
            # One table of the model is uploaded, once and for all, by the first message.
            for number, message in enumerate(one for one in messages if isinstance(one, KvChunk)):
                work.clear()
                receiver.accept(message, serialized_bytes(message))
                assert len(work.launches) <= LAUNCHES + (number == 0), work.launches
                assert not work.waits
            receiver.finish(messages[-1].end)
            assert len(work.waits) == (device.type == "cuda")
        return torch.stack([pool.keys.cpu(), pool.values.cpu()])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("policy", "budget"), [("adaptive", 0.3), ("balanced", 0.5), ("fp16", 1.0), ("native", 1.0)])
# A message has one layer, or all of them.
@pytest.mark.parametrize("chunk_bytes", [1 << 10, 1 << 20])
def test_a_message_costs_a_copy_and_a_launch_and_no_wait(policy: str, budget: float, chunk_bytes: int) -> None:
    chosen = plan(policy, budget)
    messages = sent(chosen, chunk_bytes)
    assert len(messages) == (GEOMETRY.layers if chunk_bytes == 1 << 10 else 1) + 2
    with simulated_gpu() as work:
        on_gpu = received(messages, chosen, GPU, work)
    on_cpu = received(messages, chosen, torch.device("cpu"), GpuWork())
    assert on_cpu.isfinite().sum() == on_cpu[:, :, :, :TOKENS].numel()
    assert torch.equal(on_gpu.nan_to_num(7e4), on_cpu.nan_to_num(7e4))
