"""Says how strongly a model's KV may be coded: what a probe measured, and what follows from it.

A verdict says where INT4 may be used, and the budget of requests that name none. Plans read it, the service shows
it, and `tuning.probe` finds it.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.kv.allocation import Int4Layers
from spectrumkv.common.kv.budget import BudgetKind
from spectrumkv.common.kv.policies import Policy, policies
from spectrumkv.v1 import prefill_pb2

TRIALS = 3
TRIALS_TO_PASS = 2
MAX_SAFE_KL = 1e-4
"""Nats a token by which predictions over a safe setting's KV may diverge (docs/adr, ADR 39, says why so much)."""
SOURCES = ("probe", "cache", "flag")
FLAGS = ("on", "off")
# Where the probe cannot tell. It is also the nominal budget of its INT4 trial.
UNPROBED_BUDGET = 0.3
# Where nothing that was tried is safe.
FULL_BUDGET = 1.0


@dataclass(frozen=True)
class ProbeTrial:
    """Holds the outcome of one needle-in-a-haystack question over KV at INT4.

    Attributes:
        prompt_tokens: length of the prompt.
        depth: where the needle was, from 0 (start) to 1 (end).
        found: whether the model found the needle over the received KV.
        found_fp16: whether the model found the needle over the exact KV.
        answer: what the model said over the received KV.

    Raises:
        InvalidArgumentError: the prompt is empty, or the depth is out of its range.
    """

    prompt_tokens: int
    depth: float
    found: bool
    found_fp16: bool
    answer: str

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1:
            raise InvalidArgumentError(f"a probe trial has {self.prompt_tokens} prompt tokens; it needs at least 1")
        if not 0 <= self.depth <= 1:
            raise InvalidArgumentError(f"a probe trial has its needle at depth {self.depth}; allowed: 0 to 1")


@dataclass(frozen=True)
class ProbedSetting:
    """Holds what the probe measured of one way to code KV, against the exact KV.

    Attributes:
        policy: name of the policy.
        codec: name of the codec.
        budget: in the policy's range.
        found_fp16: needles that the model finds over its exact KV.
        found: those among them that the model finds over this KV, too.
        kl: mean divergence from the distributions over exact KV, in nats a token of prose; infinite where the model
            predicts nothing any more.
        ppl_delta_pct: by how many per cent perplexity of that prose is higher. Over n tokens it scatters by about
            the square root of 2 · kl / n, so that the probe's few hundred tokens tell less by it than by `kl`.

    Raises:
        InvalidArgumentError: the counts contradict each other, a divergence is no number, or the budget is out of
            the policy's range.
    """

    policy: str
    codec: str
    budget: float
    found_fp16: int
    found: int
    kl: float
    ppl_delta_pct: float

    def __post_init__(self) -> None:
        policies.get(self.policy).check_budget(self.budget)
        if not 0 <= self.found <= self.found_fp16 <= TRIALS:
            raise InvalidArgumentError(
                f"needles found: {self.found} at budget {self.budget:g}, {self.found_fp16} over exact KV, "
                f"of {TRIALS}; the first number may not exceed the second, nor the second the third"
            )
        if math.isnan(self.kl) or math.isnan(self.ppl_delta_pct):
            raise InvalidArgumentError(f"the divergence at budget {self.budget:g} is no number")

    @property
    def safe(self) -> bool:
        """Whether every needle is found that is found over the exact KV, and predictions hardly move."""
        return self.found == self.found_fp16 and self.kl <= MAX_SAFE_KL

    @property
    def budget_is_counted(self) -> bool:
        """Whether the budget is kept in bytes on the wire."""
        return policies.get(self.policy).budget_kind is BudgetKind.BYTES


def strongest_safe_budget(settings: Iterable[ProbedSetting]) -> float | None:
    """Return the least counted budget that is safe together with all larger ones that were tried; None for none."""
    strongest = None
    for setting in sorted(settings, key=lambda one: one.budget, reverse=True):
        if setting.budget_is_counted:
            if not setting.safe:
                break
            strongest = setting.budget
    return strongest


def passes(trials: Sequence[ProbeTrial]) -> bool:
    """Return whether two of three needles are found at INT4 (SpectrumKV, arXiv 2606.08635, INT4 probe)."""
    return sum(trial.found for trial in trials) >= TRIALS_TO_PASS


def is_conclusive(trials: Sequence[ProbeTrial]) -> bool:
    """Return whether the model finds enough needles over its exact KV for a trial to say anything about INT4."""
    return sum(trial.found_fp16 for trial in trials) >= TRIALS_TO_PASS


@dataclass(frozen=True)
class ProbeVerdict:
    """Says how strongly a model's KV may be coded.

    Attributes:
        int4: layers that may be sent at INT4 by policies that heed it.
        source: "probe": measured at this start. "cache": measured at an earlier start. "flag": set by the operator.
        reason: a sentence for people.
        trials: what the verdict on INT4 rests on; none for a flag.
        settings: what was tried; none for a flag.

    Raises:
        InvalidArgumentError: the verdict contradicts itself.
    """

    int4: Int4Layers
    source: str
    reason: str
    trials: tuple[ProbeTrial, ...] = ()
    settings: tuple[ProbedSetting, ...] = ()

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise InvalidArgumentError(f"the verdict's source is {self.source!r}; allowed: {', '.join(SOURCES)}")
        if not self.reason:
            raise InvalidArgumentError("the verdict gives no reason")
        expected = 0 if self.source == "flag" else TRIALS
        if len(self.trials) != expected:
            raise InvalidArgumentError(
                f"a verdict of source {self.source!r} rests on {len(self.trials)} trials; it must be {expected}"
            )
        if bool(self.settings) is (self.source == "flag"):
            raise InvalidArgumentError(
                f"a verdict of source {self.source!r} rests on {len(self.settings)} settings; only a probe tries any"
            )
        if self.trials and self.int4.in_all_layers is not (is_conclusive(self.trials) and passes(self.trials)):
            raise InvalidArgumentError("the verdict on INT4 contradicts its trials")

    @classmethod
    def from_flag(cls, flag: str, layers: int) -> "ProbeVerdict":
        """Return the verdict that `--int4` "on" or "off" dictates for a model of `layers` layers.

        Raises:
            InvalidArgumentError: `flag` is neither.
        """
        if flag not in FLAGS:
            raise InvalidArgumentError(f"--int4 is {flag!r}; allowed: one of auto, {', '.join(FLAGS)}")
        int4 = Int4Layers() if flag == "on" else Int4Layers.in_none(layers)
        return cls(int4, "flag", f"set by --int4 {flag}; nothing was probed, so budget auto is {UNPROBED_BUDGET:g}")

    @property
    def int4_allowed(self) -> bool:
        """Whether tokens of every layer may be sent at INT4."""
        return self.int4.in_all_layers

    @property
    def safe_budget(self) -> float | None:
        """The least counted budget that is known to be safe together with all larger ones; None for none."""
        return strongest_safe_budget(self.settings) if finds_needles(self.settings) else None

    def default_budget(self, policy: Policy) -> float:
        """Return the budget of a request that names none, to a server whose operator left it open.

        A counted policy gets the strongest safe budget. A policy of tiers gets the budget that the probe tried it at.

        Args:
            policy: what spends the budget.

        Returns:
            A budget in the policy's range.
        """
        if policy.budget_kind is BudgetKind.TIER_COST:
            return next((one.budget for one in self.settings if one.policy == policy.name), UNPROBED_BUDGET)
        if not finds_needles(self.settings):
            return UNPROBED_BUDGET
        return FULL_BUDGET if self.safe_budget is None else self.safe_budget

    def to_proto(self) -> prefill_pb2.ProbeVerdict:
        """Return the message that clients see and the cache keeps."""
        return prefill_pb2.ProbeVerdict(
            int4_allowed=self.int4_allowed,
            source=self.source,
            reason=self.reason,
            trials=[
                prefill_pb2.ProbeTrial(
                    prompt_tokens=trial.prompt_tokens,
                    depth=trial.depth,
                    found=trial.found,
                    found_fp16=trial.found_fp16,
                    answer=trial.answer,
                )
                for trial in self.trials
            ],
            int4_layers_off=sorted(self.int4.off),
            settings=[
                prefill_pb2.ProbedSetting(
                    policy=one.policy,
                    codec=one.codec,
                    budget=one.budget,
                    found_fp16=one.found_fp16,
                    found=one.found,
                    kl=one.kl,
                    ppl_delta_pct=one.ppl_delta_pct,
                    safe=one.safe,
                )
                for one in self.settings
            ],
            safe_budget=self.safe_budget,
        )

    @classmethod
    def from_proto(cls, message: prefill_pb2.ProbeVerdict) -> "ProbeVerdict":
        """Return the verdict that a message holds.

        Raises:
            InvalidArgumentError: the message contradicts itself.
        """
        trials = tuple(
            ProbeTrial(trial.prompt_tokens, trial.depth, trial.found, trial.found_fp16, trial.answer)
            for trial in message.trials
        )
        settings = tuple(
            ProbedSetting(one.policy, one.codec, one.budget, one.found_fp16, one.found, one.kl, one.ppl_delta_pct)
            for one in message.settings
        )
        verdict = cls(
            Int4Layers(frozenset(message.int4_layers_off)), message.source, message.reason, trials, settings
        )
        if verdict.to_proto() != message:
            raise InvalidArgumentError("the verdict's summary does not follow from its trials and settings")
        return verdict


def finds_needles(settings: Sequence[ProbedSetting]) -> bool:
    """Return whether the model finds any needle over its exact KV."""
    return any(one.found_fp16 for one in settings)
