import math
from dataclasses import replace

import pytest

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.kv.allocation import Int4Layers
from spectrumkv.common.kv.policies import policies
from spectrumkv.common.model.spec import ModelSpec
from spectrumkv.common.service.config import PrefillConfig, build
from spectrumkv.prefill_server.transfer.plan import default_budget
from spectrumkv.prefill_server.tuning.probe import probe
from spectrumkv.prefill_server.tuning.probe.verdict_cache import VerdictKey
from spectrumkv.prefill_server.verdict import (
    FULL_BUDGET,
    UNPROBED_BUDGET,
    ProbedSetting,
    ProbeTrial,
    ProbeVerdict,
    is_conclusive,
    passes,
    strongest_safe_budget,
)
from spectrumkv.v1 import prefill_pb2

SPEC = ModelSpec(
    architecture="llama",
    weights_digest="0" * 64,
    layers=2,
    kv_heads=2,
    head_dim=64,
    dtype="float32",
    rope_digest="1" * 64,
    tokenizer_digest="2" * 64,
    vocab_size=100,
    context_length=128,
)
KEY = VerdictKey(SPEC, (("absmax", 1), ("spectral", 1)), basis="3" * 64, probe_version=1)


LAYERS = 4


def trials(found: int, exact: int) -> tuple[ProbeTrial, ...]:
    return tuple(ProbeTrial(1000 + i, i / 2, i < found, i < exact, f"answer {i}") for i in range(3))


def setting(budget: float, kl: float, found: int = 3, exact: int = 3, policy: str = "spectral") -> ProbedSetting:
    codec = "spectral" if policy == "spectral" else "absmax"
    return ProbedSetting(policy, codec, budget, exact, min(found, exact), kl, 100 * kl)


def settings(exact: int = 3) -> tuple[ProbedSetting, ...]:
    """The INT4 trial's, and a sweep that is safe down to 0.25."""
    counted = [setting(0.5, 1e-7, exact=exact), setting(0.25, 5e-5, exact=exact), setting(0.2, 2e-4, exact=exact)]
    return (setting(0.3, 4e-3, exact=exact, policy="greedy"), *counted)


def verdict_of(found: int, exact: int, off: Int4Layers | None = None) -> ProbeVerdict:
    one = trials(found, exact)
    refused = Int4Layers.in_none(LAYERS) if off is None else off
    int4 = Int4Layers() if is_conclusive(one) and passes(one) else refused
    return probe.verdict_of(one, settings(exact), int4, LAYERS)


VERDICT = verdict_of(3, 2)


@pytest.mark.parametrize(
    ("found", "exact", "allowed"),
    [
        (0, 3, False), (1, 3, False), (2, 3, True), (3, 3, True),
        (0, 2, False), (1, 2, False), (2, 2, True), (3, 2, True),
        (0, 1, False), (1, 1, False), (2, 1, False), (3, 1, False),
        (0, 0, False), (3, 0, False),
    ],
)  # fmt: skip
def test_two_of_three_needles_allow_int4(found: int, exact: int, allowed: bool) -> None:
    verdict = verdict_of(found, exact)
    assert verdict.int4_allowed is allowed
    assert verdict.source == "probe"
    assert f"{exact}" in verdict.reason
    assert ("--int4 on" in verdict.reason) is (exact < 2)
    assert ("can tell nothing" in verdict.reason) is (exact < 2)
    if exact >= 2:
        assert f"{found} of 3 needles" in verdict.reason
    # The wrong way round it is a contradiction.
    with pytest.raises(InvalidArgumentError, match="contradicts its trials"):
        replace(verdict, int4=Int4Layers.in_none(LAYERS) if allowed else Int4Layers())


def test_layers_without_int4_are_named() -> None:
    some = verdict_of(1, 3, Int4Layers(frozenset({3, 0})))
    assert not some.int4_allowed
    assert "in layers 0, 3 it finds enough" in some.reason
    assert "some layers does not help" in verdict_of(1, 3).reason


@pytest.mark.parametrize(
    ("tried", "strongest"),
    [
        ([(0.5, 1e-7, 3), (0.3, 1e-5, 3), (0.25, 9e-5, 3)], 0.25),
        # In whatever order they were tried.
        ([(0.25, 9e-5, 3), (0.5, 1e-7, 3), (0.3, 1e-5, 3)], 0.25),
        ([(0.5, 1e-7, 3), (0.3, 1e-5, 3), (0.25, 1.1e-4, 3)], 0.3),
        # What lies below something unsafe is luck.
        ([(0.5, 1e-7, 3), (0.3, 2e-4, 3), (0.25, 5e-5, 3)], 0.5),
        ([(0.5, 1e-7, 3), (0.3, 1e-5, 2), (0.25, 5e-5, 3)], 0.5),
        ([(0.5, 1e-7, 2), (0.3, 1e-5, 3)], None),
        ([(0.5, math.inf, 3)], None),
        ([], None),
    ],
)
def test_the_strongest_safe_budget_has_only_safe_ones_above(
    tried: list[tuple[float, float, int]], strongest: float | None
) -> None:
    unsafe_tiers = setting(1.0, 1.0, policy="greedy")
    assert strongest_safe_budget([unsafe_tiers, *(setting(*one) for one in tried)]) == strongest


def test_a_needle_that_is_not_found_over_exact_kv_either_counts_for_nothing() -> None:
    assert setting(0.3, 1e-5, found=2, exact=2).safe
    assert not setting(0.3, 1e-5, found=1, exact=2).safe


SPECTRAL, ADAPTIVE = policies.get("spectral"), policies.get("adaptive")


def test_the_default_budget_is_what_was_found() -> None:
    assert (VERDICT.safe_budget, VERDICT.default_budget(SPECTRAL)) == (0.25, 0.25)
    assert "safe from 0.25 up" in VERDICT.reason
    # Tiers were tried at 0.3, and nobody knows what they do at 0.25.
    assert VERDICT.default_budget(ADAPTIVE) == UNPROBED_BUDGET
    mended = replace(VERDICT, settings=(*VERDICT.settings, setting(0.32, 3e-3, policy="adaptive")))
    assert (mended.default_budget(ADAPTIVE), mended.default_budget(SPECTRAL)) == (0.32, 0.25)


def test_without_needles_or_a_probe_the_default_budget_is_the_one_before_probes() -> None:
    for verdict in (verdict_of(0, 0), ProbeVerdict.from_flag("on", LAYERS), ProbeVerdict.from_flag("off", LAYERS)):
        assert verdict.safe_budget is None
        assert verdict.default_budget(SPECTRAL) == verdict.default_budget(ADAPTIVE) == UNPROBED_BUDGET
        assert f"budget auto {'stays' if verdict.trials else 'is'} {UNPROBED_BUDGET:g}" in verdict.reason


def test_where_nothing_is_safe_all_bytes_are_sent() -> None:
    harmed = [setting(0.3, 1.0, policy="greedy"), setting(0.5, 1e-3)]
    verdict = probe.verdict_of(trials(3, 3), harmed, Int4Layers(), LAYERS)
    assert verdict.safe_budget is None
    assert verdict.default_budget(SPECTRAL) == FULL_BUDGET
    assert "budget auto is 1" in verdict.reason


def test_the_operators_budget_is_taken_as_it_is() -> None:
    for policy in (SPECTRAL, ADAPTIVE):
        assert default_budget(policy, build(PrefillConfig, {"budget": "0.11"}), VERDICT) == 0.11
        assert default_budget(policy, build(PrefillConfig, {"budget": 0.7}), VERDICT) == 0.7
        for left_open in ({}, {"budget": "auto"}):
            expected = VERDICT.default_budget(policy)
            assert default_budget(policy, build(PrefillConfig, left_open), VERDICT) == expected


@pytest.mark.parametrize(("flag", "allowed"), [("on", True), ("off", False)])
def test_a_flag_is_a_verdict(flag: str, allowed: bool) -> None:
    verdict = ProbeVerdict.from_flag(flag, LAYERS)
    assert (verdict.int4_allowed, verdict.source, verdict.trials) == (allowed, "flag", ())
    assert [verdict.int4.allows(layer) for layer in range(LAYERS)] == [allowed] * LAYERS
    assert f"--int4 {flag}" in verdict.reason


def test_verdicts_that_make_no_sense_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="'guess'; allowed: probe, cache, flag"):
        replace(VERDICT, source="guess")
    with pytest.raises(InvalidArgumentError, match="no reason"):
        replace(VERDICT, reason="")
    with pytest.raises(InvalidArgumentError, match="'flag' rests on 3 trials"):
        replace(VERDICT, source="flag")
    with pytest.raises(InvalidArgumentError, match="'flag' rests on 4 settings"):
        replace(VERDICT, source="flag", trials=())
    with pytest.raises(InvalidArgumentError, match="'probe' rests on 0 settings"):
        replace(VERDICT, settings=())
    with pytest.raises(InvalidArgumentError, match="'probe' rests on 2 trials"):
        probe.verdict_of(VERDICT.trials[:2], VERDICT.settings, Int4Layers(), LAYERS)
    with pytest.raises(InvalidArgumentError, match=r"depth 1\.5"):
        replace(VERDICT.trials[0], depth=1.5)
    with pytest.raises(InvalidArgumentError, match="0 prompt tokens"):
        replace(VERDICT.trials[0], prompt_tokens=0)
    with pytest.raises(InvalidArgumentError, match="'auto'"):
        ProbeVerdict.from_flag("auto", LAYERS)
    with pytest.raises(InvalidArgumentError, match="cannot keep to budget 2"):
        replace(VERDICT.settings[0], budget=2.0)
    with pytest.raises(InvalidArgumentError, match=r"3 at budget .*, 2 over exact KV"):
        replace(VERDICT.settings[0], found_fp16=2, found=3)
    with pytest.raises(InvalidArgumentError, match="no number"):
        replace(VERDICT.settings[0], kl=math.nan)


@pytest.mark.parametrize(
    "verdict",
    [
        VERDICT,
        verdict_of(0, 0),
        verdict_of(1, 3, Int4Layers(frozenset({2}))),
        probe.verdict_of(trials(3, 3), [setting(0.5, math.inf)], Int4Layers(), LAYERS),
        ProbeVerdict.from_flag("on", LAYERS),
        ProbeVerdict.from_flag("off", LAYERS),
    ],
)
def test_the_message_has_all_of_a_verdict(verdict: ProbeVerdict) -> None:
    assert ProbeVerdict.from_proto(verdict.to_proto()) == verdict


@pytest.mark.parametrize(
    ("field", "value"), [("int4_allowed", False), ("safe_budget", 0.2), ("int4_layers_off", [1]), ("settings", [])]
)
def test_a_message_that_contradicts_itself_is_refused(field: str, value: object) -> None:
    message = VERDICT.to_proto()
    message.ClearField(field)  # type: ignore[arg-type]
    message.MergeFrom(prefill_pb2.ProbeVerdict(**{field: value}))  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError):
        ProbeVerdict.from_proto(message)
