"""What prefill asks of a GPU for each layer between the model and the messages: launches, and waits of the host."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from prometheus_client import CollectorRegistry

from spectrumkv.common.errors import InvalidArgumentError, NotFiniteError
from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.kv.codecs import absmax, segmentation
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.wire import KvChunk
from spectrumkv.common.rpc.decode_stream import Request
from spectrumkv.common.service.config import PrefillConfig
from spectrumkv.common.telemetry.metrics import Metrics
from spectrumkv.prefill_server.transfer import pipeline as kv_pipeline
from spectrumkv.prefill_server.transfer.pipeline import FirstToken, KvPipeline
from spectrumkv.prefill_server.transfer.plan import KvPlan
from spectrumkv.prefill_server.verdict import ProbeVerdict
from spectrumkv.v1 import decode_pb2, prefill_pb2
from tests.simulated_gpu import GPU, GpuWork, simulated_gpu

LAYERS, KV_HEADS, HEAD_DIM, TOKENS, WINDOW = 2, 2, 32, 120, 8
# Policy, budget, most launches and most waits of a layer.
BOUNDS = [
    ("native", 1.0, 3, 1),
    ("fp16", 1.0, 3, 1),
    ("uniform-int4", 0.25, 3, 1),
    ("adaptive", 0.3, 5, 1),
    ("sink-protect", 0.6, 5, 1),
    ("sws", 0.4, 5, 1),
]


def captures(dtype: torch.dtype, device: torch.device) -> list[LayerCapture]:
    made = []
    for layer in range(LAYERS):
        generator = torch.Generator().manual_seed(layer)
        keys, values = torch.randn(2, KV_HEADS, TOKENS, HEAD_DIM, generator=generator).to(dtype).to(device)
        queries = torch.randn(3 * KV_HEADS, WINDOW, HEAD_DIM, generator=generator).to(dtype).to(device)
        made.append(LayerCapture(queries, keys, values, HEAD_DIM**-0.5, None, None, layer))
    return made


def messages(chosen: KvPlan, layers: list[LayerCapture], dtype: torch.dtype, device: torch.device) -> list[Request]:
    """What leaves for decode."""
    geometry = KvGeometry(LAYERS, KV_HEADS, HEAD_DIM, dtype)
    begin = decode_pb2.Begin(prompt_token_ids=range(TOKENS))
    pipeline = KvPipeline(begin, chosen, geometry, 1 << 10, Metrics(CollectorRegistry()), device)
    for capture in layers:
        pipeline.put_layer(capture)
    pipeline.put_first_tokens(FirstToken(42, finished=False))
    # Work is counted on this thread only.
    with patch.object(kv_pipeline, "PrefetchIterator", lambda items, depth, name: items):
        return list(pipeline.messages())


def plan(policy: str, budget: float, scorer: str = "attention", scope: str = "layer") -> KvPlan:
    options = prefill_pb2.KvOptions(policy=policy, budget=budget, scorer=scorer, scope=scope)
    return KvPlan.resolve(options, PrefillConfig(), ProbeVerdict.from_flag("on", LAYERS), seed=3)


def of_gpu(chosen: KvPlan, dtype: torch.dtype) -> tuple[list[Request], GpuWork]:
    """What leaves for decode from a GPU, and what that was asked to do."""
    with simulated_gpu() as work:
        layers = captures(dtype, GPU)
        work.clear()
        return messages(chosen, layers, dtype, GPU), work


@pytest.mark.parametrize(("policy", "budget", "launches", "waits"), BOUNDS)
def test_a_layer_costs_few_launches_and_waits(policy: str, budget: float, launches: int, waits: int) -> None:
    sent, work = of_gpu(plan(policy, budget), torch.float16)
    assert len(sent) > 2
    # One table of the model may be uploaded, once and for all.
    assert 0 < len(work.launches) <= launches * LAYERS + 1, work.launches
    assert 0 < len(work.waits) <= waits * LAYERS, work.waits


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (absmax, segmentation):
        monkeypatch.setattr(module, "MAX_BODY_BYTES", 5000)


@pytest.mark.usefixtures("small_segments")
@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize(
    ("policy", "budget", "dtype"),
    [
        ("adaptive", 0.3, torch.float16),
        ("adaptive", 0.2, torch.bfloat16),
        ("sink-protect", 0.6, torch.float32),
        ("balanced", 0.5, torch.float16),
        ("random", 0.4, torch.float16),
        ("uniform-int8", 0.5, torch.bfloat16),
        ("native", 1.0, torch.bfloat16),
    ],
)
def test_a_gpu_sends_the_bytes_that_a_cpu_sends(policy: str, budget: float, dtype: torch.dtype, scope: str) -> None:
    # Scores that both compute with the same operations: attention differs in its last digits.
    chosen = plan(policy, budget, "key_norm", scope)
    on_gpu, _ = of_gpu(chosen, dtype)
    on_cpu = messages(chosen, captures(dtype, torch.device("cpu")), dtype, torch.device("cpu"))
    payloads = [[bytes(one.payload) for one in sent if isinstance(one, KvChunk)] for sent in (on_gpu, on_cpu)]
    assert payloads[0] == payloads[1]
    assert len(payloads[0]) > LAYERS or policy in ("adaptive", "uniform-int8")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("policy", "side", "poison", "error", "text"),
    [
        ("adaptive", "queries", torch.nan, NotFiniteError, "score of token"),
        ("adaptive", "values", torch.inf, NotFiniteError, "values of 1 of"),
        ("uniform-int4", "keys", torch.nan, NotFiniteError, "keys of 1 of"),
        ("uniform-int8", "keys", 9e6, InvalidArgumentError, "keys of 1 of"),
        ("fp16", "values", 1e5, InvalidArgumentError, "1 do not fit"),
        ("native", "values", -torch.inf, NotFiniteError, "1 are infinite or NaN"),
    ],
)
def test_what_cannot_be_sent_is_refused(
    policy: str, side: str, poison: float, error: type[Exception], text: str
) -> None:
    budget = 1.0 if policy in ("fp16", "native") else 0.5
    layers = captures(torch.float32, torch.device("cpu"))
    getattr(layers[1], side)[1, 5, 7] = poison
    with simulated_gpu():
        poisoned = [
            replace(one, queries=one.queries.to(GPU), keys=one.keys.to(GPU), values=one.values.to(GPU))
            for one in layers
        ]
        with pytest.raises(error, match=text):
            messages(plan(policy, budget), poisoned, torch.float32, GPU)
