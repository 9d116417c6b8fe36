"""Byte counters equal what is seen on the wire, for every policy, scorer and architecture."""

import pytest

from spectrumkv.client.request import KvChoice, Sampling, TokenIds
from spectrumkv.common.kv.budget import BudgetKind
from spectrumkv.common.kv.policies import policies
from spectrumkv.common.kv.scoring import scorers
from spectrumkv.common.service.config import PrefillConfig
from spectrumkv.prefill_server.verdict import UNPROBED_BUDGET
from tests.services.kv.test_lossless import random_prompt
from tests.services.pair import Pair, sample, total

# Long enough that HTTP/2's own frames and headers, which nobody counts, stay well under 1 %.
PROMPT_TOKENS = 400


@pytest.mark.parametrize(
    "scorer",
    [
        name if name == PrefillConfig.scorer else pytest.param(name, marks=pytest.mark.slow)
        for name in scorers.names()
    ],
)
@pytest.mark.parametrize("policy", policies.names())
def test_counted_bytes_are_those_on_the_wire(tiny_pair: Pair, policy: str, scorer: str) -> None:
    before = snapshot(tiny_pair)
    with tiny_pair.client() as client:
        completion = client.generate(
            TokenIds(tuple(random_prompt(PROMPT_TOKENS))),
            sampling=Sampling(max_tokens=3, ignore_eos=True),
            kv=KvChoice(policy=policy, scorer=scorer),
        ).result()
    usage = completion.usage
    sent, received, seen, tier_bytes = (
        after - earlier for after, earlier in zip(snapshot(tiny_pair), before, strict=True)
    )
    assert usage.completion_tokens == 3
    assert sent == received == usage.kv_bytes_sent
    assert seen == pytest.approx(sent, rel=0.01)
    assert tier_bytes == sum(tier.bytes for tier in usage.tiers)
    assert sum(tier.tokens for tier in usage.tiers) == pytest.approx(PROMPT_TOKENS)
    assert usage.kv_fp16_bytes == tiny_pair.prefill.geometry.fp16_bytes(PROMPT_TOKENS)
    assert usage.budget_counted == pytest.approx(usage.kv_bytes_sent / usage.kv_fp16_bytes)
    assert usage.recomputed_prompt_tokens == 0
    if policies.get(policy).budget_kind is BudgetKind.BYTES:
        # Nothing was probed for these services.
        assert 0.99 * UNPROBED_BUDGET <= usage.budget_counted <= UNPROBED_BUDGET


def snapshot(pair: Pair) -> tuple[float, float, float, float]:
    """Bytes sent, bytes received, bytes on the wire, and bytes of codes and scales, so far."""
    sent = total(pair.prefill_metrics, "kv_bytes_sent_total")
    received = total(pair.decode_metrics, "kv_bytes_received_total")
    framing = sample(pair.prefill_metrics, "kv_bytes_sent_total", tier="framing")
    return sent, received, pair.proxy.bytes_to_target, sent - framing
