"""The probe: at deployment, the strongest safe setting of codec and tiers for a model.

Three needle-in-a-haystack prompts and two stretches of prose run once each. Every setting of the sweep codes their
KV, and what the model then answers and predicts is held against the exact KV. The first setting is the paper's trial
of INT4 (SpectrumKV, arXiv 2606.08635, INT4 probe: Greedy at 0.3, two of three needles); where it fails, the layers
are looked for that INT4 harms most. The others are counted budgets of the spectral codec.
"""

import logging
from collections.abc import Sequence

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.kv.allocation import Int4Layers
from spectrumkv.common.kv.codecs.base import Codec, codecs
from spectrumkv.common.kv.codecs.spectral.basis import SpectralBasis
from spectrumkv.common.kv.codecs.spectral.codec import SpectralCodec
from spectrumkv.common.kv.codecs.tiered import tier_codecs
from spectrumkv.common.kv.tiers import Tier
from spectrumkv.common.model.load import LoadedModel
from spectrumkv.prefill_server.engine.engine import PrefillEngine
from spectrumkv.prefill_server.transfer.plan import KvPlan
from spectrumkv.prefill_server.tuning.probe.budget_sweep import budget_sweep, int4_trial_without
from spectrumkv.prefill_server.tuning.probe.layer_search import find_int4_layers
from spectrumkv.prefill_server.tuning.probe.progress import OnProgress, ProbeProgress
from spectrumkv.prefill_server.tuning.probe.results import ProbedSetting, ProbeTrial, is_conclusive, passes
from spectrumkv.prefill_server.tuning.probe.runner import ProbeRunner, probed_setting
from spectrumkv.prefill_server.tuning.probe.verdict import ProbeVerdict
from spectrumkv.prefill_server.tuning.probe.verdict_cache import VerdictKey, keep_verdict, read_verdict

# Raised whenever the probe asks something else or judges in another way, so that old verdicts are not used.
PROBE_VERSION = 2
PROBE_CODEC = "absmax"

logger = logging.getLogger(__name__)


def resolve_verdict(
    loaded: LoadedModel,
    engine: PrefillEngine,
    basis: SpectralBasis,
    mode: str,
    on_progress: OnProgress,
    codec: str = PROBE_CODEC,
) -> ProbeVerdict:
    """Settle how strongly KV may be coded: by the flag, by what an earlier probe found, or by probing now.

    Args:
        loaded: the model.
        engine: runs it.
        basis: of its spectral codec.
        mode: `--int4`: "on" and "off" settle it, "auto" asks the probe.
        on_progress: called before each step of a probe.
        codec: name of the codec that writes INT4.

    Raises:
        InvalidArgumentError: `mode` is none of these, or `codec` is unknown or has no INT4.
        FailedPreconditionError: the model's context is too short to probe it.
    """
    if mode != "auto":
        return ProbeVerdict.from_flag(mode, loaded.geometry.layers)
    verdict = read_verdict(verdict_key(loaded, basis, codec))
    if verdict is None:
        verdict = probe_and_keep(loaded, engine, basis, on_progress, codec)
    logger.info("INT4 is %s (%s): %s", "allowed" if verdict.int4_allowed else "off", verdict.source, verdict.reason)
    return verdict


def probe_and_keep(
    loaded: LoadedModel,
    engine: PrefillEngine,
    basis: SpectralBasis,
    on_progress: OnProgress,
    codec: str = PROBE_CODEC,
) -> ProbeVerdict:
    """Probe, whatever is known already, and keep the verdict; see `resolve_verdict`."""
    verdict = run_probe(loaded, engine, basis, on_progress, codecs.get(codec))
    keep_verdict(verdict_key(loaded, basis, codec), verdict)
    return verdict


def verdict_key(loaded: LoadedModel, basis: SpectralBasis, codec: str = PROBE_CODEC) -> VerdictKey:
    """Return under what the verdict on a model is kept."""
    used = (codecs.get(codec), codecs.get(SpectralCodec.name))
    return VerdictKey.of(loaded.spec, used, basis.digest, PROBE_VERSION)


def run_probe(
    loaded: LoadedModel, engine: PrefillEngine, basis: SpectralBasis, on_progress: OnProgress, codec: Codec
) -> ProbeVerdict:
    """Put the questions to the model.

    Args:
        loaded: the model.
        engine: runs it; requests that come meanwhile take turns with the probe's steps.
        basis: of its spectral codec.
        on_progress: called before each step.
        codec: writes INT4.

    Raises:
        InvalidArgumentError: the codec has no INT4.
        FailedPreconditionError: the model's context is too short.
    """
    with_int4 = [name for name, one in tier_codecs().items() if Tier.INT4 in one.tiers]
    if codec.name not in with_int4:
        raise InvalidArgumentError(f"codec {codec.name!r} has no INT4 to probe; valid: {', '.join(with_int4)}")
    examination = ProbeRunner.of(loaded, engine, ProbeProgress(on_progress))
    trials, settings = _held(examination, budget_sweep(codec, basis))
    int4, mending = _settle_int4(examination, codec, trials)
    return ProbeVerdict.from_findings(trials, [*settings, *mending], int4, loaded.geometry.layers)


def _held(examination: ProbeRunner, plans: Sequence[KvPlan]) -> tuple[list[ProbeTrial], list[ProbedSetting]]:
    """What holding settings against exact KV finds: the first one's trials, and all settings."""
    answers, readings = examination.hold(plans)
    settings = [probed_setting(plan, rung, answers, readings) for rung, plan in enumerate(plans)]
    return [one.trial(rung=0) for one in answers], settings


def _settle_int4(
    examination: ProbeRunner, codec: Codec, trials: Sequence[ProbeTrial]
) -> tuple[Int4Layers, list[ProbedSetting]]:
    """Where INT4 may be used; where that is in some layers only, also the setting that shows that it may."""
    layers = examination.loaded.geometry.layers
    if not is_conclusive(trials):
        return Int4Layers.nowhere(layers), []
    if passes(trials):
        return Int4Layers(), []
    int4 = find_int4_layers(examination, codec)
    if len(int4.off) < layers:
        # The search takes for granted that more layers at INT8 lose no needle that fewer keep.
        again, settings = _held(examination, [int4_trial_without(codec, int4.off, layers)])
        if passes(again):
            return int4, settings
    return Int4Layers.nowhere(layers), []
