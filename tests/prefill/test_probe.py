import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from spectrumkv.client.command_line import main
from spectrumkv.common.errors import FailedPreconditionError, InvalidArgumentError
from spectrumkv.common.kv.absmax import AbsmaxCodec
from spectrumkv.common.kv.codec import codecs
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.tiers import Tier
from spectrumkv.common.model.load import LoadedModel, load_model
from spectrumkv.prefill_server.engine import PrefillEngine
from spectrumkv.prefill_server.probe import (
    DEPTHS,
    PROBE_VERSION,
    ProbeStep,
    probe_and_keep,
    resolve_verdict,
    run_probe,
)
from spectrumkv.prefill_server.verdict import ProbeTrial, ProbeVerdict
from spectrumkv.prefill_server.verdict_cache import VerdictKey, keep_verdict, read_verdict
from tests.tiny_models import tiny_model

ABSMAX = codecs.get("absmax")


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    """A model of random weights, which finds nothing."""
    return load_model(str(tiny_model("llama")), "cpu")


@pytest.fixture
def engine(tiny: LoadedModel) -> Iterator[PrefillEngine]:
    engine = PrefillEngine(tiny, window=8)
    yield engine
    engine.stop()


def kept(loaded: LoadedModel, allowed: bool) -> ProbeVerdict:
    """Put a verdict into the cache and return it."""
    found = 3 if allowed else 0
    trials = [ProbeTrial(1000, 0.5, i < found, True, "12345") for i in range(3)]
    verdict = ProbeVerdict.from_trials(trials)
    keep_verdict(VerdictKey.of(loaded.spec, ABSMAX, PROBE_VERSION), verdict)
    return verdict


def nothing(step: ProbeStep) -> None:
    raise AssertionError(f"a probe was run: {step}")


def test_a_model_that_finds_nothing_over_exact_kv_gets_no_int4(tiny: LoadedModel, engine: PrefillEngine) -> None:
    steps: list[ProbeStep] = []
    verdict = run_probe(tiny, engine, steps.append, ABSMAX)
    assert not verdict.int4_allowed
    assert verdict.source == "probe"
    assert "can tell nothing" in verdict.reason
    assert "--int4 on" in verdict.reason
    assert [trial.depth for trial in verdict.trials] == list(DEPTHS)
    assert all(900 < trial.prompt_tokens <= 1024 for trial in verdict.trials)
    assert not any(trial.found or trial.found_fp16 for trial in verdict.trials)
    assert all(trial.answer for trial in verdict.trials)
    assert [(step.number, step.total) for step in steps] == [(number, 9) for number in range(1, 10)]
    assert str(steps[0]).startswith("INT4 probe, step 1 of 9: a prompt of ")


def test_a_short_context_is_probed_as_far_as_it_goes(tiny: LoadedModel, engine: PrefillEngine) -> None:
    verdict = run_probe(replace(tiny, context_length=400), engine, str, ABSMAX)
    assert all(280 < trial.prompt_tokens <= 384 for trial in verdict.trials)


def test_a_context_that_holds_no_needle_needs_the_operator(tiny: LoadedModel, engine: PrefillEngine) -> None:
    with pytest.raises(FailedPreconditionError, match=r"64 tokens of .* --int4 on or --int4 off"):
        run_probe(replace(tiny, context_length=64), engine, nothing, ABSMAX)


def test_a_codec_without_int4_has_nothing_to_probe(tiny: LoadedModel, engine: PrefillEngine) -> None:
    with pytest.raises(InvalidArgumentError, match=r"'native' has no INT4 to probe; valid: .*absmax"):
        run_probe(tiny, engine, nothing, codecs.get("native"))


@pytest.mark.parametrize(("mode", "allowed"), [("on", True), ("off", False)])
def test_a_flag_settles_it_without_a_probe(
    tiny: LoadedModel, engine: PrefillEngine, cache: Path, mode: str, allowed: bool
) -> None:
    kept(tiny, not allowed)
    verdict = resolve_verdict(tiny, engine, mode, nothing)
    assert (verdict.int4_allowed, verdict.source) == (allowed, "flag")


def test_an_unknown_mode_is_refused(tiny: LoadedModel, engine: PrefillEngine, cache: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="--int4 is 'maybe'; allowed: one of auto, on, off"):
        resolve_verdict(tiny, engine, "maybe", nothing)


def test_a_kept_verdict_spares_the_probe(tiny: LoadedModel, engine: PrefillEngine, cache: Path) -> None:
    expected = kept(tiny, allowed=True)
    assert resolve_verdict(tiny, engine, "auto", nothing) == replace(expected, source="cache")


def test_the_first_start_probes_and_the_second_remembers(
    tiny: LoadedModel, engine: PrefillEngine, cache: Path
) -> None:
    short = replace(tiny, context_length=300)
    first = resolve_verdict(short, engine, "auto", str)
    assert first.source == "probe"
    assert resolve_verdict(short, engine, "auto", nothing) == replace(first, source="cache")


def test_probing_anew_replaces_what_was_kept(tiny: LoadedModel, engine: PrefillEngine, cache: Path) -> None:
    short = replace(tiny, context_length=300)
    kept(short, allowed=True)
    verdict = probe_and_keep(short, engine, str)
    assert verdict.source == "probe"
    assert not verdict.int4_allowed
    assert resolve_verdict(short, engine, "auto", nothing) == replace(verdict, source="cache")


def test_the_command_probes_and_exits_with_0_whatever_the_verdict(
    tiny: LoadedModel, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept(tiny, allowed=True)
    assert main(["probe", "--model", str(tiny_model("llama")), "--device", "cpu", "--json", "-"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["codec"] == {"name": "absmax", "version": ABSMAX.version}
    assert (result["device"], result["dtype"]) == ("cpu", "float32")
    assert result["int4_probe"]["source"] == "probe"
    assert not result["int4_probe"]["int4_allowed"]
    assert [trial["depth"] for trial in result["int4_probe"]["trials"]] == list(DEPTHS)
    remembered = read_verdict(VerdictKey.of(tiny.spec, ABSMAX, PROBE_VERSION))
    assert remembered is not None
    assert not remembered.int4_allowed


def test_the_command_refuses_what_it_cannot_probe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "--codec", "zip"]) == 1
    assert "unknown codec 'zip'; valid:" in capsys.readouterr().err


class BrokenInt4(AbsmaxCodec):
    """Hands out noise for what it wrote at INT4, as a model's INT4 may be under its outliers."""

    def decode(
        self,
        body: torch.Tensor,
        tiers: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        geometry: KvGeometry,
    ) -> dict[Tier, int]:
        taken = super().decode(body, tiers, keys, values, geometry)
        for states in (keys, values):
            noise = torch.randn(states.shape, generator=torch.Generator().manual_seed(0))
            broken = (tiers == Tier.INT4)[:, None]
            states.copy_(torch.where(broken, states.abs().amax(dim=-1, keepdim=True) * noise, states))
        return taken


@pytest.mark.slow
@pytest.mark.parametrize(("codec", "allowed"), [(ABSMAX, True), (BrokenInt4(), False)], ids=["absmax", "broken"])
def test_the_default_model_takes_int4_unless_it_is_broken(codec: AbsmaxCodec, allowed: bool) -> None:
    loaded = load_model(None, "cpu")
    engine = PrefillEngine(loaded, window=8)
    try:
        verdict = run_probe(loaded, engine, str, codec)
    finally:
        engine.stop()
    assert sum(trial.found_fp16 for trial in verdict.trials) >= 2
    assert verdict.int4_allowed is allowed
