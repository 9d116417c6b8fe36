"""What a request keeps, and what its end says of it."""

from dataclasses import replace

import pytest
import torch

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.generation.params import SamplingParams
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.tiers import Tier
from spectrumkv.common.service.config import PrefillConfig
from spectrumkv.prefill_server.progress import Progress
from spectrumkv.prefill_server.request import PrefillRequest
from spectrumkv.prefill_server.transfer.plan import KvPlan
from spectrumkv.prefill_server.transfer.sent_kv import SentKv
from spectrumkv.prefill_server.verdict import ProbeVerdict
from spectrumkv.v1 import kv_pb2, prefill_pb2

GEOMETRY = KvGeometry(layers=2, kv_heads=1, head_dim=8, native_dtype=torch.float32)
PLAN = KvPlan.resolve(
    prefill_pb2.KvOptions(policy="greedy", budget=0.5), PrefillConfig(), ProbeVerdict.from_flag("on", 2), seed=5
)
PARAMS = SamplingParams(max_tokens=4, seed=5)


def request(progress: Progress | None = None) -> PrefillRequest:
    return PrefillRequest("r1", [1, 2, 3], PARAMS, PLAN, progress or Progress(arrived_at=10.0))


def test_decode_reserves_prompt_and_answer() -> None:
    assert request().slots == 7


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"request_id": ""}, "no id"),
        ({"token_ids": []}, "no tokens"),
        ({"params": replace(PARAMS, seed=None)}, "no seed"),
    ],
)
def test_a_request_that_lacks_something_is_refused(change: dict[str, object], sentence: str) -> None:
    fields: dict[str, object] = {"request_id": "r1", "token_ids": [1], "params": PARAMS, "plan": PLAN}
    with pytest.raises(InvalidArgumentError, match=sentence):
        PrefillRequest(**{**fields, **change, "progress": Progress(0.0)})  # type: ignore[arg-type]


def test_usage_counts_what_was_sent() -> None:
    sent = SentKv(message_bytes=96)
    sent.tier_tokens[Tier.INT8], sent.tier_bytes[Tier.INT8] = 6, 60
    usage = request(Progress(10.0, completion_tokens=4, recomputed_prompt_tokens=1)).usage(
        PLAN, sent, GEOMETRY, "127.0.0.1:1"
    )
    assert (usage.prompt_tokens, usage.completion_tokens, usage.recomputed_prompt_tokens) == (3, 4, 1)
    # FP16: 2 bytes for each of 8 elements of 3 tokens, keys and values, in 2 layers.
    assert usage.kv_fp16_bytes == 2 * 8 * 3 * 2 * 2
    assert usage.kv_bytes_sent == 96
    [tier] = usage.tiers
    assert (tier.tier, tier.tokens, tier.bytes) == (kv_pb2.TIER_INT8, 3, 60)
    assert usage.decode_worker == "127.0.0.1:1"
