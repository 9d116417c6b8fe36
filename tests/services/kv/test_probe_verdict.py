"""What the probe found reaches requests that leave it open, and clients."""

from collections.abc import Iterator

import pytest

from spectrumkv.client.request import KvChoice, Sampling, TokenIds
from spectrumkv.common.kv.allocation import Int4Layers
from spectrumkv.common.kv.policies import policies
from spectrumkv.prefill_server.tuning.probe.probe import verdict_of
from spectrumkv.prefill_server.verdict import ProbedSetting, ProbeTrial, ProbeVerdict
from spectrumkv.v1 import prefill_pb2
from tests.services.kv.test_lossless import random_prompt
from tests.services.pair import Pair, running_pair, sample
from tests.tiny_models import tiny_model

PROMPT_TOKENS = 200
# Found by a probe that finds all needles over exact KV, one of them over INT4, and two of them without it in layer 1.
VERDICT = verdict_of(
    [ProbeTrial(1000, 0.5, number == 0, found_fp16=True, answer="1") for number in range(3)],
    [
        ProbedSetting("greedy", "absmax", 0.3, 3, 1, 5e-2, 1.0),
        ProbedSetting("spectral", "spectral", 0.4, 3, 3, 1e-6, 0.0),
        ProbedSetting("spectral", "spectral", 0.2, 3, 3, 2e-4, 0.0),
    ],
    Int4Layers(frozenset({1})),
    layers=3,
)


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with running_pair(tiny_model("llama"), VERDICT) as running:
        yield running


def usage_of(pair: Pair, kv: KvChoice):
    with pair.client() as client:
        prompt = TokenIds(tuple(random_prompt(PROMPT_TOKENS)))
        return client.generate(prompt, sampling=Sampling(max_tokens=2, ignore_eos=True), kv=kv).result().usage


def tokens(usage) -> dict[str, float]:
    return {one.tier: pytest.approx(one.tokens) for one in usage.tiers}


def test_a_layer_without_int4_gets_int8_on_the_wire_and_the_others_pay(pair: Pair) -> None:
    usage = usage_of(pair, KvChoice(policy="adaptive", budget=0.4))
    # Two layers at 0.35 have 40 % at INT8 and 60 % at INT4; tokens are means over the three layers.
    assert tokens(usage) == {"int4": 2 * 120 / 3, "int8": (2 * 80 + 200) / 3}
    assert usage.budget_nominal == pytest.approx(0.4)


def test_one_tier_for_all_layers_does_without_int4(pair: Pair) -> None:
    usage = usage_of(pair, KvChoice(policy="adaptive", budget=0.4, scope="model"))
    assert tokens(usage) == {"int8": 160, "drop": 40}


def test_a_policy_of_int4_by_name_is_what_was_asked_for(pair: Pair) -> None:
    assert tokens(usage_of(pair, KvChoice(policy="uniform-int4", budget=0.3))) == {"int4": 200}


def test_a_budget_that_nobody_names_is_the_strongest_safe_one(pair: Pair) -> None:
    usage = usage_of(pair, KvChoice())
    assert usage.policy == "spectral"
    assert 0.98 * 0.4 <= usage.budget_counted <= 0.4
    # Policies of tiers keep to the budget that their own trial had.
    assert usage_of(pair, KvChoice(policy="greedy")).budget_nominal == pytest.approx(0.3)
    assert usage_of(pair, KvChoice(policy="spectral", budget=0.2)).budget_counted <= 0.2


def test_clients_and_metrics_are_told(pair: Pair) -> None:
    with pair.client() as client:
        info = client.server_info()
    assert info.defaults.budget == 0.4
    assert ProbeVerdict.from_proto(info.probe) == VERDICT
    assert list(info.probe.int4_layers_off) == [1]
    in_bytes = {one.name for one in info.policies if one.budget_kind == prefill_pb2.BUDGET_KIND_BYTES}
    in_tiers = {one.name for one in info.policies if one.budget_kind == prefill_pb2.BUDGET_KIND_TIER_COST}
    assert (in_bytes, in_tiers) == ({"spectral"}, set(policies) - {"spectral"})
    assert VERDICT.default_budget(policies.get("spectral")) == 0.4
    assert sample(pair.prefill_metrics, "probe_safe_budget_ratio") == 0.4
    assert sample(pair.prefill_metrics, "int4_probe_passed") == 0
