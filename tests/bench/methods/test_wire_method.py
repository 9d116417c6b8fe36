"""Counted bytes are the serialized bytes of every message, whatever policy and scorer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectrumkv.bench.methods.method import ExactFp16, mean_tier_cost
from spectrumkv.bench.methods.served_model import ServedModel
from spectrumkv.bench.methods.wire_method import is_fixed
from spectrumkv.common.kv.policies import policies
from spectrumkv.common.kv.tiers import Tier, count_tiers
from spectrumkv.common.rpc.decode_stream import serialized_bytes
from spectrumkv.prefill_server.transfer.pipeline import FirstToken, KvPipeline
from tests.bench.conftest import wire_method
from tests.services.kv.test_lossless import random_prompt
from tests.services.pair import total

CONTEXT = 60


@pytest.mark.parametrize("name", policies.names())
def test_counted_bytes_are_the_pipelines(served: ServedModel, name: str) -> None:
    method = wire_method(served, name)
    prompt = served.prefill(random_prompt(CONTEXT))
    sent_before, received_before = (total(served.metrics, f"kv_bytes_{way}_total") for way in ("sent", "received"))
    with served.receive(method, prompt) as (_, sent):
        pass
    assert sent.counted == total(served.metrics, "kv_bytes_sent_total") - sent_before
    begin = method._begin(prompt)
    pipeline = KvPipeline(begin, method.plan, served.loaded.geometry, method.chunk_bytes, served.metrics)
    for layer in prompt.captured.layers:
        pipeline.put_layer(layer)
    pipeline.put_first_tokens(FirstToken(prompt.captured.first_token, finished=False))
    messages = [serialized_bytes(message) for message in pipeline.messages()]
    assert sent.counted == sum(messages)
    received = total(served.metrics, "kv_bytes_received_total") - received_before
    assert received == sum(messages[1:-1])
    tokens = sum(pipeline.sent.tier_tokens.values())
    nominal = sum(Tier(tier).nominal_cost * count for tier, count in pipeline.sent.tier_tokens.items())
    assert sent.budget_nominal == pytest.approx(nominal / tokens)


@pytest.mark.parametrize("name", policies.names())
def test_a_fixed_policy_sends_the_same_at_every_budget(served: ServedModel, name: str) -> None:
    policy = policies.get(name)
    prompt = served.prefill(random_prompt(CONTEXT))
    counted = set()
    for budget in (policy.min_budget, policy.max_budget):
        with served.receive(wire_method(served, name, budget=budget), prompt) as (_, sent):
            counted.add(sent.counted)
    assert is_fixed(policy) == (len(counted) == 1)


def test_the_reference_counts_two_bytes_an_element(served: ServedModel) -> None:
    prompt = served.prefill(random_prompt(CONTEXT))
    with served.receive(ExactFp16(), prompt) as (_, sent):
        assert sent.counted == served.loaded.geometry.fp16_bytes(CONTEXT)


@given(st.lists(st.sampled_from(Tier), min_size=1, max_size=70))
def test_mean_tier_cost_is_that_of_the_tokens(tiers):
    mean = sum(tier.nominal_cost for tier in tiers) / len(tiers)
    assert mean_tier_cost(count_tiers(torch.tensor(tiers, dtype=torch.uint8))) == pytest.approx(mean, abs=1e-12)


def test_mean_tier_cost_of_several_layers_is_their_mean():
    tiers = torch.tensor([[Tier.FP16, Tier.DROP], [Tier.INT8, Tier.INT4]], dtype=torch.uint8)
    assert mean_tier_cost(count_tiers(tiers)) == 0.4375
    assert mean_tier_cost(dict.fromkeys(Tier, 0)) == 0
