"""The INT4 probe: can this model still find a needle when most of the haystack's KV is at INT4?

SpectrumKV (arXiv 2606.08635, INT4 probe): once per model at deployment, three needle-in-a-haystack trials under
three-tier Greedy at budget 0.3; INT4 is allowed if at least two succeed. Each trial is also put over the exact KV,
since a needle that is not found there says nothing about INT4.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from spectrumkv.common.errors import FailedPreconditionError, InvalidArgumentError
from spectrumkv.common.kv.codec import Codec, codecs, tier_codecs
from spectrumkv.common.kv.policy import policies
from spectrumkv.common.kv.tiers import Tier
from spectrumkv.common.model.load import LoadedModel
from spectrumkv.common.needle.prompt import NeedlePrompt, needle_prompt
from spectrumkv.prefill_server.engine import PrefillEngine
from spectrumkv.prefill_server.plan import KvPlan
from spectrumkv.prefill_server.replay import CapturedPrompt, LayerKv, capture_prompt, generate_over
from spectrumkv.prefill_server.verdict import ProbeTrial, ProbeVerdict
from spectrumkv.prefill_server.verdict_cache import VerdictKey, keep_verdict, read_verdict

# Raised whenever the probe asks something else or in another way, so that old verdicts are not used.
PROBE_VERSION = 1
PROBE_CODEC = "absmax"
BUDGET = 0.3
# One trial per depth, each with a needle of its own.
DEPTHS = (0.1, 0.5, 0.9)
PROMPT_TOKENS = 1024
ANSWER_TOKENS = 16
# The verdict is kept for all starts, so it must not hang on the --window of this one.
WINDOW = 64
STEPS_PER_TRIAL = 3

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProbeStep:
    """What the probe is about to do.

    Attributes:
        number: from 1.
        total: steps of the whole probe.
        doing: in words.
    """

    number: int
    total: int
    doing: str

    def __str__(self) -> str:
        return f"INT4 probe, step {self.number} of {self.total}: {self.doing}"


OnProgress = Callable[[ProbeStep], object]


def resolve_verdict(
    loaded: LoadedModel, engine: PrefillEngine, mode: str, on_progress: OnProgress, codec: str = PROBE_CODEC
) -> ProbeVerdict:
    """Settle whether INT4 is allowed: by the flag, by what an earlier probe found, or by probing now.

    Args:
        loaded: the model.
        engine: runs it.
        mode: `--int4`: "on" and "off" settle it, "auto" asks the probe.
        on_progress: called before each step of a probe.
        codec: name of the codec that writes INT4.

    Raises:
        InvalidArgumentError: `mode` is none of these, or `codec` is unknown or has no INT4.
        FailedPreconditionError: the model's context is too short to probe it.
    """
    if mode != "auto":
        return ProbeVerdict.from_flag(mode)
    verdict = read_verdict(VerdictKey.of(loaded.spec, codecs.get(codec), PROBE_VERSION))
    if verdict is None:
        verdict = probe_and_keep(loaded, engine, on_progress, codec)
    logger.info("INT4 is %s (%s): %s", "allowed" if verdict.int4_allowed else "off", verdict.source, verdict.reason)
    return verdict


def probe_and_keep(
    loaded: LoadedModel, engine: PrefillEngine, on_progress: OnProgress, codec: str = PROBE_CODEC
) -> ProbeVerdict:
    """Probe, whatever is known already, and keep the verdict; see `resolve_verdict`."""
    verdict = run_probe(loaded, engine, on_progress, codecs.get(codec))
    keep_verdict(VerdictKey.of(loaded.spec, codecs.get(codec), PROBE_VERSION), verdict)
    return verdict


def run_probe(loaded: LoadedModel, engine: PrefillEngine, on_progress: OnProgress, codec: Codec) -> ProbeVerdict:
    """Put the three questions to the model.

    Args:
        loaded: the model.
        engine: runs it; requests that come meanwhile take turns with the probe's steps.
        on_progress: called before each step.
        codec: writes the tiers.

    Raises:
        InvalidArgumentError: the codec has no INT4.
        FailedPreconditionError: the model's context is too short.
    """
    with_int4 = [name for name, one in tier_codecs().items() if Tier.INT4 in one.tiers]
    if codec.name not in with_int4:
        raise InvalidArgumentError(f"codec {codec.name!r} has no INT4 to probe; valid: {', '.join(with_int4)}")
    prompts = [_prompt(loaded, needle, depth) for needle, depth in enumerate(DEPTHS)]
    progress = _Progress(len(prompts) * STEPS_PER_TRIAL, on_progress)
    trials = [_Trial(loaded, engine, codec, prompt).run(progress) for prompt in prompts]
    return ProbeVerdict.from_trials(trials)


def _prompt(loaded: LoadedModel, needle: int, depth: float) -> NeedlePrompt:
    room = min(PROMPT_TOKENS, loaded.context_length - ANSWER_TOKENS)
    try:
        return needle_prompt(loaded.tokenizer, room, depth, needle)
    except InvalidArgumentError as error:
        raise FailedPreconditionError(
            f"the INT4 probe needs a longer context than the {loaded.context_length} tokens of {loaded.name} "
            f"({error.message}); start with --int4 on or --int4 off"
        ) from error


class _Progress:
    """Counts the steps of a probe and announces each one."""

    def __init__(self, total: int, on_progress: OnProgress) -> None:
        self._total = total
        self._on_progress = on_progress
        self._number = 0

    def begin(self, doing: str) -> None:
        self._number += 1
        self._on_progress(ProbeStep(self._number, self._total, doing))


@dataclass(frozen=True)
class _Trial:
    """One prompt, answered over its exact and over its received KV."""

    loaded: LoadedModel
    engine: PrefillEngine
    codec: Codec
    prompt: NeedlePrompt

    def run(self, progress: _Progress) -> ProbeTrial:
        model, call = self.loaded.model, self.engine.submit_call
        depth = f"{self.prompt.depth:.0%}"
        progress.begin(f"a prompt of {len(self.prompt.token_ids)} tokens, its needle at {depth}")
        captured = call(lambda: capture_prompt(model, self.prompt.token_ids, WINDOW)).result()
        progress.begin(f"needle at {depth}, the answer over the exact KV")
        exact = call(lambda: self._answer(captured.exact_kv(), captured.first_token)).result()
        progress.begin(f"needle at {depth}, the answer over KV at budget {BUDGET:g}")
        received = call(lambda: self._answer(self._received_kv(captured), captured.first_token)).result()
        return self._judge(exact, received)

    def _received_kv(self, captured: CapturedPrompt) -> list[LayerKv]:
        plan = KvPlan(
            policy=policies.get("greedy"),
            budget=BUDGET,
            scorer="attention",
            codec=self.codec,
            scope="layer",
            int4_allowed=True,
            seed=0,
        )
        return captured.received_kv(plan, self.loaded.geometry)

    def _answer(self, kv: list[LayerKv], first_token: int) -> str:
        tokens = generate_over(self.loaded.model, kv, first_token, ANSWER_TOKENS, self.loaded.eos_token_ids)
        text: str = self.loaded.tokenizer.decode(tokens, skip_special_tokens=True)
        return text.strip()

    def _judge(self, exact: str, received: str) -> ProbeTrial:
        trial = ProbeTrial(
            prompt_tokens=len(self.prompt.token_ids),
            depth=self.prompt.depth,
            found=self.prompt.is_answered_by(received),
            found_fp16=self.prompt.is_answered_by(exact),
            answer=received,
        )
        logger.info(
            "INT4 probe: the needle is %s; at %.0f %% of %d tokens the model answers %r over exact KV and %r over "
            "received KV",
            self.prompt.fact.answer, 100 * trial.depth, trial.prompt_tokens, exact, received,
        )  # fmt: skip
        return trial
