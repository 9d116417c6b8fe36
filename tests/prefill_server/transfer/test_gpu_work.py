"""What prefill asks of a GPU for each layer between the model and the messages: launches, and waits of the host."""

from unittest.mock import patch

import pytest
import torch
from prometheus_client import CollectorRegistry

from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.rpc.decode_stream import Request
from spectrumkv.common.service.config import PrefillConfig
from spectrumkv.common.telemetry.metrics import Metrics
from spectrumkv.prefill_server.transfer import pipeline as kv_pipeline
from spectrumkv.prefill_server.transfer.pipeline import FirstToken, KvPipeline
from spectrumkv.prefill_server.transfer.plan import KvPlan
from spectrumkv.prefill_server.verdict import ProbeVerdict
from spectrumkv.v1 import decode_pb2, prefill_pb2
from tests.simulated_gpu import GPU, GpuWork, simulated_gpu

LAYERS, KV_HEADS, HEAD_DIM, TOKENS, WINDOW = 3, 2, 64, 200, 16
# Policy, budget, most launches and most waits of a layer.
BOUNDS = [
    ("native", 1.0, 3, 2),
    ("fp16", 1.0, 3, 2),
    ("uniform-int4", 0.25, 3, 2),
    ("adaptive", 0.3, 12, 4),
]


def captures(dtype: torch.dtype, device: torch.device) -> list[LayerCapture]:
    made = []
    for layer in range(LAYERS):
        generator = torch.Generator().manual_seed(layer)
        keys, values = torch.randn(2, KV_HEADS, TOKENS, HEAD_DIM, generator=generator).to(dtype).to(device)
        queries = torch.randn(3 * KV_HEADS, WINDOW, HEAD_DIM, generator=generator).to(dtype).to(device)
        made.append(LayerCapture(queries, keys, values, HEAD_DIM**-0.5, None, None, layer))
    return made


def messages(plan: KvPlan, layers: list[LayerCapture], dtype: torch.dtype, device: torch.device) -> list[Request]:
    """What leaves for decode."""
    geometry = KvGeometry(LAYERS, KV_HEADS, HEAD_DIM, dtype)
    begin = decode_pb2.Begin(prompt_token_ids=range(TOKENS))
    pipeline = KvPipeline(begin, plan, geometry, 64 << 10, Metrics(CollectorRegistry()), device)
    for capture in layers:
        pipeline.put_layer(capture)
    pipeline.put_first_token(FirstToken(42, finished=False))
    # Work is counted on this thread only.
    with patch.object(kv_pipeline, "PrefetchIterator", lambda items, depth, name: items):
        return list(pipeline.messages())


def work_of(policy: str, budget: float, dtype: torch.dtype = torch.float16) -> GpuWork:
    options = prefill_pb2.KvOptions(policy=policy, budget=budget)
    plan = KvPlan.resolve(options, PrefillConfig(), ProbeVerdict.from_flag("on", LAYERS), seed=3)
    with simulated_gpu() as work:
        layers = captures(dtype, GPU)
        work.clear()
        on_gpu = messages(plan, layers, dtype, GPU)
    assert work.launches, "nothing was asked of the GPU"
    on_cpu = messages(plan, captures(dtype, torch.device("cpu")), dtype, torch.device("cpu"))
    assert len(on_gpu) == len(on_cpu)
    return work


@pytest.mark.parametrize(("policy", "budget", "launches", "waits"), BOUNDS)
def test_a_layer_costs_few_launches_and_waits(policy: str, budget: float, launches: int, waits: int) -> None:
    work = work_of(policy, budget)
    assert len(work.launches) <= launches * LAYERS, work.launches
    assert len(work.waits) <= waits * LAYERS, work.waits
