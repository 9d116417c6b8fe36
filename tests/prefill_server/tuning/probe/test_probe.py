import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from spectrumkv.client.cli.main import main
from spectrumkv.common.errors import FailedPreconditionError, InvalidArgumentError
from spectrumkv.common.kv.allocation import Int4Layers
from spectrumkv.common.kv.codecs.absmax import AbsmaxCodec
from spectrumkv.common.kv.codecs.base import codecs
from spectrumkv.common.kv.codecs.calibrated.basis import CalibratedBasis
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.policies import policies
from spectrumkv.common.kv.tiers import Tier
from spectrumkv.common.model.load import LoadedModel, load_model
from spectrumkv.prefill_server.engine.engine import PrefillEngine
from spectrumkv.prefill_server.transfer.plan import KvPlan
from spectrumkv.prefill_server.tuning.basis_cache import resolve_basis
from spectrumkv.prefill_server.tuning.probe import questions, sweep
from spectrumkv.prefill_server.tuning.probe.probe import (
    probe_and_keep,
    resolve_verdict,
    run_probe,
    verdict_key,
    verdict_of,
)
from spectrumkv.prefill_server.tuning.probe.questions import DEPTHS, NeedleQuestion
from spectrumkv.prefill_server.tuning.probe.runner import ProbeStep
from spectrumkv.prefill_server.tuning.probe.verdict_cache import keep_verdict, read_verdict
from spectrumkv.prefill_server.tuning.replay import CapturedPrompt, capture_prompt
from spectrumkv.prefill_server.verdict import UNPROBED_BUDGET, ProbedSetting, ProbeTrial, ProbeVerdict
from tests.tiny_models import tiny_model

ABSMAX = codecs.get("absmax")


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    """A model of random weights, which finds nothing."""
    return load_model(str(tiny_model("llama")), "cpu")


@pytest.fixture
def engine(tiny: LoadedModel) -> Iterator[PrefillEngine]:
    with PrefillEngine(tiny, window=8) as engine:
        yield engine


@pytest.fixture(scope="module")
def basis(tiny: LoadedModel) -> CalibratedBasis:
    with PrefillEngine(tiny, window=8):
        return resolve_basis(tiny, lambda done: None)


def kept(loaded: LoadedModel, basis: CalibratedBasis, allowed: bool) -> ProbeVerdict:
    """Put a verdict into the cache and return it."""
    found = 3 if allowed else 0
    trials = [ProbeTrial(1000, 0.5, i < found, True, "12345") for i in range(3)]
    settings = [ProbedSetting("greedy", "absmax", 0.3, 3, found, 5e-3, 0.1)]
    layers = loaded.geometry.layers
    int4 = Int4Layers() if allowed else Int4Layers.in_none(layers)
    verdict = verdict_of(trials, settings, int4, layers)
    keep_verdict(verdict_key(loaded, basis), verdict)
    return verdict


def nothing(step: ProbeStep) -> None:
    raise AssertionError(f"a probe was run: {step}")


SHORT_SWEEP = (0.5, 0.2)


@pytest.fixture
def short_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two counted budgets, for tests about what surrounds them."""
    monkeypatch.setattr(sweep, "COUNTED_BUDGETS", SHORT_SWEEP)


@pytest.mark.usefixtures("short_sweep")
def test_a_model_that_finds_nothing_over_exact_kv_gets_no_int4(
    tiny: LoadedModel, engine: PrefillEngine, basis: CalibratedBasis, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []

    def counted(model: PreTrainedModel, token_ids: Sequence[int], window: int) -> CapturedPrompt:
        lengths.append(len(token_ids))
        return capture_prompt(model, token_ids, window)

    monkeypatch.setattr(questions, "capture_prompt", counted)
    steps: list[ProbeStep] = []
    # A short context is probed as far as it goes.
    verdict = run_probe(replace(tiny, context_length=400), engine, basis, steps.append, ABSMAX)
    assert verdict.int4 == Int4Layers.in_none(tiny.geometry.layers)
    assert verdict.source == "probe"
    assert "can tell nothing" in verdict.reason
    assert "--int4 on" in verdict.reason
    assert [trial.depth for trial in verdict.trials] == list(DEPTHS)
    assert all(280 < trial.prompt_tokens <= 384 for trial in verdict.trials)
    assert not any(trial.found or trial.found_fp16 for trial in verdict.trials)
    assert all(trial.answer for trial in verdict.trials)
    assert [(step.number, step.total) for step in steps] == [(number, 20) for number in range(1, 21)]
    assert str(steps[0]).startswith("probe, step 1 of 20: a prompt of ")
    # Each prompt runs once.
    assert lengths == [*(trial.prompt_tokens for trial in verdict.trials), 300, 300]
    # Prose is measured all the same: the more bytes, the closer to the exact KV.
    assert [one.budget for one in verdict.settings] == [0.3, *SHORT_SWEEP]
    _, finer, coarser = verdict.settings
    assert 0 < finer.kl < coarser.kl
    assert verdict.default_budget(policies.get("spectral")) == UNPROBED_BUDGET


def test_a_context_that_holds_no_needle_needs_the_operator(
    tiny: LoadedModel, engine: PrefillEngine, basis: CalibratedBasis
) -> None:
    with pytest.raises(FailedPreconditionError, match=r"64 tokens of .* --int4 on or --int4 off"):
        run_probe(replace(tiny, context_length=64), engine, basis, nothing, ABSMAX)


def test_a_codec_without_int4_has_nothing_to_probe(
    tiny: LoadedModel, engine: PrefillEngine, basis: CalibratedBasis
) -> None:
    with pytest.raises(InvalidArgumentError, match=r"'native' has no INT4 to probe; allowed: .*absmax"):
        run_probe(tiny, engine, basis, nothing, codecs.get("native"))


@pytest.mark.parametrize(("mode", "allowed"), [("on", True), ("off", False)])
def test_a_flag_settles_it_without_a_probe(
    tiny: LoadedModel, engine: PrefillEngine, basis: CalibratedBasis, cache: Path, mode: str, allowed: bool
) -> None:
    kept(tiny, basis, not allowed)
    verdict = resolve_verdict(tiny, engine, basis, mode, nothing)
    assert (verdict.int4_allowed, verdict.source) == (allowed, "flag")


def test_an_unknown_mode_is_refused(
    tiny: LoadedModel, engine: PrefillEngine, basis: CalibratedBasis, cache: Path
) -> None:
    with pytest.raises(InvalidArgumentError, match="--int4 is 'maybe'; allowed: one of auto, on, off"):
        resolve_verdict(tiny, engine, basis, "maybe", nothing)


def test_a_kept_verdict_spares_the_probe(
    tiny: LoadedModel, engine: PrefillEngine, basis: CalibratedBasis, cache: Path
) -> None:
    expected = kept(tiny, basis, allowed=True)
    assert resolve_verdict(tiny, engine, basis, "auto", nothing) == replace(expected, source="cache")


@pytest.mark.usefixtures("short_sweep")
def test_the_first_start_probes_and_the_second_remembers_until_somebody_probes_anew(
    tiny: LoadedModel, engine: PrefillEngine, basis: CalibratedBasis, cache: Path
) -> None:
    short = replace(tiny, context_length=300)
    first = resolve_verdict(short, engine, basis, "auto", str)
    assert first.source == "probe"
    assert resolve_verdict(short, engine, basis, "auto", nothing) == replace(first, source="cache")
    kept(short, basis, allowed=True)
    assert resolve_verdict(short, engine, basis, "auto", nothing).int4_allowed
    assert probe_and_keep(short, engine, basis, str) == first
    assert resolve_verdict(short, engine, basis, "auto", nothing) == replace(first, source="cache")


def test_another_basis_is_another_question(tiny: LoadedModel, basis: CalibratedBasis, cache: Path) -> None:
    kept(tiny, basis, allowed=True)
    other = replace(basis, mean=basis.mean + 1)
    assert read_verdict(verdict_key(tiny, other)) is None


@pytest.mark.usefixtures("short_sweep")
def test_the_command_probes_and_exits_with_0_whatever_the_verdict(
    tiny: LoadedModel, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["probe", "--model", str(tiny_model("llama")), "--device", "cpu", "--json", "-"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["codec"] == {"name": "absmax", "version": ABSMAX.version}
    assert (result["device"], result["dtype"]) == ("cpu", "float32")
    found = result["int4_probe"]
    assert found["source"] == "probe"
    assert not found["int4_allowed"]
    assert found["int4_layers_off"] == [0, 1, 2]
    assert [trial["depth"] for trial in found["trials"]] == list(DEPTHS)
    assert [one["budget"] for one in found["settings"]] == [0.3, *SHORT_SWEEP]
    with PrefillEngine(tiny, window=8) as engine:
        remembered = resolve_verdict(tiny, engine, resolve_basis(tiny, lambda done: None), "auto", nothing)
    assert remembered.source == "cache"
    assert not remembered.int4_allowed


def test_the_command_refuses_what_it_cannot_probe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "--codec", "zip"]) == 1
    assert "unknown codec 'zip'; allowed:" in capsys.readouterr().err


class BrokenInt4(AbsmaxCodec):
    """Hands out noise for what it wrote at INT4 in some layers, as a model's INT4 may be under its outliers.

    Args:
        layers: of the model.
        broken: those.
    """

    def __init__(self, layers: int, broken: frozenset[int]) -> None:
        self._layers = layers
        self._broken = broken
        self._layer = -1

    def decode(
        self,
        body: torch.Tensor,
        tiers: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        geometry: KvGeometry,
    ) -> dict[Tier, int]:
        taken = super().decode(body, tiers, keys, values, geometry)
        # A prompt's layers come in order, each in one segment or more, the first of which is written at its start.
        if keys.storage_offset() == 0:
            self._layer = (self._layer + 1) % self._layers
        for states in (keys, values) if self._layer in self._broken else ():
            noise = torch.randn(states.shape, generator=torch.Generator().manual_seed(0))
            broken = (tiers == Tier.INT4)[:, None]
            states.copy_(torch.where(broken, states.abs().amax(dim=-1, keepdim=True) * noise, states))
        return taken


@pytest.mark.usefixtures("short_sweep")
@pytest.mark.parametrize("holds", [True, False], ids=["holds", "does not hold"])
def test_a_layer_whose_int4_is_broken_does_without_if_that_holds(
    tiny: LoadedModel, engine: PrefillEngine, basis: CalibratedBasis, monkeypatch: pytest.MonkeyPatch, holds: bool
) -> None:
    """Layers are ranked by real damage; the answers are made up, since a model of random weights has none."""
    tried: list[KvPlan] = []

    def answer_under(question: NeedleQuestion, plan: KvPlan) -> str:
        tried.append(plan)
        found = plan.codec.name == "spectral" or not plan.int4.allows(1)
        # The search asks each prompt with two layers off and with one; then comes the setting that is to show it.
        searched = sum(not one.int4.in_all_layers for one in tried) > 3 * 2
        return question.prompt.fact.answer if found and (holds or not searched) else "unknown"

    monkeypatch.setattr(NeedleQuestion, "answer_under", answer_under)
    monkeypatch.setattr(NeedleQuestion, "found_fp16", True)
    steps: list[ProbeStep] = []
    short = replace(tiny, context_length=300)
    verdict = run_probe(short, engine, basis, steps.append, BrokenInt4(3, frozenset({1})))
    assert not verdict.int4_allowed
    assert [step.number for step in steps] == list(range(1, len(steps) + 1))
    assert all(step.number <= step.total for step in steps)
    policy = policies.get("adaptive")
    if holds:
        assert verdict.int4.off == {1}
        assert "in layer 1 it finds enough" in verdict.reason
        shown = verdict.settings[-1]
        assert (shown.policy, shown.found) == ("adaptive", 3)
        assert shown.kl < verdict.settings[0].kl
        assert verdict.default_budget(policy) == shown.budget == pytest.approx((0.5 + 2 * 0.3) / 3)
    else:
        assert verdict.int4 == Int4Layers.in_none(3)
        assert "does not help" in verdict.reason
        assert [one.policy for one in verdict.settings] == ["greedy", "spectral", "spectral"]
        assert verdict.default_budget(policy) == UNPROBED_BUDGET


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_default_model_takes_int4_and_a_fifth_to_a_quarter_of_the_bytes() -> None:
    loaded = load_model(None, "cpu")
    with PrefillEngine(loaded, window=8) as engine:
        verdict = run_probe(loaded, engine, resolve_basis(loaded, lambda done: None), str, ABSMAX)
    assert sum(trial.found_fp16 for trial in verdict.trials) >= 2
    assert verdict.int4_allowed
    assert verdict.safe_budget in (0.2, 0.25)
    assert verdict.default_budget(policies.get("spectral")) == verdict.safe_budget
    counted = [one for one in verdict.settings if one.budget_is_counted]
    assert [one.safe for one in counted] == [one.budget >= verdict.safe_budget for one in counted]
    assert all(later.kl > 2 * earlier.kl for earlier, later in itertools.pairwise(counted))
