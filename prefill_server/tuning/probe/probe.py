"""The probe: at deployment, the strongest safe setting of codec and tiers for a model.

Three needle-in-a-haystack prompts and two stretches of prose run once each. Every setting of the sweep codes their
KV, and the model's answers and predictions over it are compared with those over the exact KV. The first setting is
the paper's trial of INT4 (SpectrumKV, arXiv 2606.08635, INT4 probe: Greedy at 0.3, two of three needles). Where the
model fails it, a search finds the layers that INT4 harms most. The other settings are counted budgets of policy
"spectral", written by the codec that requests get on this device.
"""

import logging
from collections.abc import Sequence

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.kv.allocation import Int4Layers
from spectrumkv.common.kv.codecs.base import Codec, codecs
from spectrumkv.common.kv.codecs.basis import Basis
from spectrumkv.common.kv.codecs.fixed_rate.kernel_fault import kernels_code
from spectrumkv.common.kv.codecs.spectral.codec import SpectralCodec
from spectrumkv.common.kv.codecs.tiered import tier_codecs
from spectrumkv.common.kv.tiers import Tier
from spectrumkv.common.model.load import LoadedModel
from spectrumkv.prefill_server.engine.engine import PrefillEngine
from spectrumkv.prefill_server.tuning.probe.runner import OnProgress, ProbeProgress, ProbeRunner
from spectrumkv.prefill_server.tuning.probe.sweep import budget_sweep, find_int4_layers, int4_trial_without
from spectrumkv.prefill_server.tuning.probe.verdict_cache import VerdictKey, keep_verdict, read_verdict
from spectrumkv.prefill_server.verdict import (
    FULL_BUDGET,
    TRIALS,
    TRIALS_TO_PASS,
    UNPROBED_BUDGET,
    ProbedSetting,
    ProbeTrial,
    ProbeVerdict,
    finds_needles,
    is_conclusive,
    passes,
    strongest_safe_budget,
)

# Raised whenever the probe asks something else or judges in another way, so that old verdicts are not used.
PROBE_VERSION = 2
PROBE_CODEC = "absmax"

logger = logging.getLogger(__name__)


def resolve_verdict(
    loaded: LoadedModel,
    engine: PrefillEngine,
    basis: Basis,
    mode: str,
    on_progress: OnProgress,
) -> ProbeVerdict:
    """Settle how strongly KV may be coded: by the flag, by what an earlier probe found, or by probing now.

    Args:
        loaded: the model.
        engine: runs the model.
        basis: of the model's spectral codec.
        mode: the value of `--int4`: "on" and "off" decide it, "auto" asks the probe.
        on_progress: called before each step of a probe.

    Returns:
        The verdict; its `source` says which of the three it came from.

    Raises:
        InvalidArgumentError: `mode` is none of these.
        FailedPreconditionError: the model's context is too short to probe it.
    """
    if mode != "auto":
        return ProbeVerdict.from_flag(mode, loaded.geometry.layers)
    verdict = read_verdict(verdict_key(loaded, basis))
    if verdict is None:
        verdict = probe_and_keep(loaded, engine, basis, on_progress)
    logger.info("INT4 is %s (%s): %s", "allowed" if verdict.int4_allowed else "off", verdict.source, verdict.reason)
    return verdict


def probe_and_keep(
    loaded: LoadedModel,
    engine: PrefillEngine,
    basis: Basis,
    on_progress: OnProgress,
    codec: str = PROBE_CODEC,
) -> ProbeVerdict:
    """Probe even where a verdict is kept already, and keep the new one.

    Args:
        loaded: the model.
        engine: runs the model.
        basis: of the model's spectral codec.
        on_progress: called before each step.
        codec: name of the codec that writes INT4.

    Returns:
        A verdict of source "probe".

    Raises:
        InvalidArgumentError: `codec` is unknown or has no INT4.
        FailedPreconditionError: the model's context is too short.
    """
    verdict = run_probe(loaded, engine, basis, on_progress, codecs.get(codec))
    keep_verdict(verdict_key(loaded, basis, codec), verdict)
    return verdict


def verdict_key(loaded: LoadedModel, basis: Basis, codec: str = PROBE_CODEC) -> VerdictKey:
    """Return the key under which the verdict on a model is kept."""
    used = (codecs.get(codec), counted_codec(loaded))
    return VerdictKey.of(loaded.spec, used, basis.digest, PROBE_VERSION)


def counted_codec(loaded: LoadedModel) -> Codec:
    """Return the codec that writes counted budgets on a model's device where a request names none.

    On a CPU the faster codec may stand in for it at times, and costs more; the budget is that of the usual one.

    Args:
        loaded: the model.
    """
    spectral = codecs.get(SpectralCodec.name)
    on_gpu = spectral.gpu_codec if kernels_code(loaded.device) else None
    return spectral if on_gpu is None else codecs.get(on_gpu)


def run_probe(
    loaded: LoadedModel, engine: PrefillEngine, basis: Basis, on_progress: OnProgress, codec: Codec
) -> ProbeVerdict:
    """Put the questions to the model.

    Args:
        loaded: the model.
        engine: runs the model; requests that come meanwhile take turns with the probe's steps.
        basis: of the model's spectral codec.
        on_progress: called before each step.
        codec: writes INT4.

    Returns:
        A verdict of source "probe".

    Raises:
        InvalidArgumentError: the codec has no INT4.
        FailedPreconditionError: the model's context is too short.
    """
    with_int4 = [name for name, one in tier_codecs().items() if Tier.INT4 in one.tiers]
    if codec.name not in with_int4:
        raise InvalidArgumentError(f"codec {codec.name!r} has no INT4 to probe; allowed: {', '.join(with_int4)}")
    runner = ProbeRunner.of(loaded, engine, ProbeProgress(on_progress))
    trials, settings = runner.measure(budget_sweep(codec, counted_codec(loaded), basis))
    int4, more_settings = _decide_int4(runner, codec, trials)
    return verdict_of(trials, [*settings, *more_settings], int4, loaded.geometry.layers)


def _decide_int4(
    runner: ProbeRunner, codec: Codec, trials: Sequence[ProbeTrial]
) -> tuple[Int4Layers, list[ProbedSetting]]:
    """Return where INT4 may be used; where only some layers may, also the setting that shows it."""
    layers = runner.loaded.geometry.layers
    if not is_conclusive(trials):
        return Int4Layers.in_none(layers), []
    if passes(trials):
        return Int4Layers(), []
    int4 = find_int4_layers(runner, codec)
    if len(int4.off) < layers:
        # The search takes for granted that more layers at INT8 lose no needle that fewer keep.
        again, settings = runner.measure([int4_trial_without(codec, int4.off, layers)])
        if passes(again):
            return int4, settings
    return Int4Layers.in_none(layers), []


def verdict_of(
    trials: Sequence[ProbeTrial], settings: Sequence[ProbedSetting], int4: Int4Layers, layers: int
) -> ProbeVerdict:
    """Put a probe's results together.

    Args:
        trials: three.
        settings: what was tried.
        int4: all layers where the trials pass, and otherwise the layers that may keep INT4.
        layers: how many layers the model has.

    Returns:
        A verdict of source "probe".

    Raises:
        InvalidArgumentError: the results contradict each other.
    """
    reason = f"{_reason_of_int4(trials, int4, layers)}; {_reason_of_budget(settings)}"
    return ProbeVerdict(int4, "probe", reason, tuple(trials), tuple(settings))


def _reason_of_int4(trials: Sequence[ProbeTrial], int4: Int4Layers, layers: int) -> str:
    found = sum(trial.found for trial in trials)
    exact = sum(trial.found_fp16 for trial in trials)
    if not is_conclusive(trials):
        return (
            f"the model finds {exact} of {TRIALS} needles over its exact KV, so the probe can tell nothing about "
            "INT4; --int4 on allows it anyway"
        )
    counts = (
        f"with INT4 the model finds {found} of {TRIALS} needles, {TRIALS_TO_PASS} are needed; "
        f"over its exact KV it finds {exact}"
    )
    if int4.in_all_layers:
        return counts
    if len(int4.off) == layers:
        return f"{counts}; leaving INT4 out of some layers does not help"
    where = f"layer{'s' if len(int4.off) > 1 else ''} {int4.off_list}"
    return f"{counts}; with INT8 in place of INT4 in {where} it finds enough"


def _reason_of_budget(settings: Sequence[ProbedSetting]) -> str:
    if not finds_needles(settings):
        return f"without needles the probe cannot judge counted budgets, so budget auto stays {UNPROBED_BUDGET:g}"
    safe = strongest_safe_budget(settings)
    if safe is None:
        return f"no counted budget that was tried is safe, so budget auto is {FULL_BUDGET:g}"
    return f"counted budgets are safe from {safe:g} up"
