"""What follows from what the probe found: where INT4 may be used, and the budget of requests that name none."""

from collections.abc import Sequence
from dataclasses import dataclass

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.kv.allocation import Int4Layers
from spectrumkv.common.kv.policies import BudgetKind, Policy
from spectrumkv.prefill_server.tuning.probe.results import (
    TRIALS,
    TRIALS_TO_PASS,
    ProbedSetting,
    ProbeTrial,
    is_conclusive,
    passes,
    strongest_safe_budget,
)
from spectrumkv.v1 import prefill_pb2

SOURCES = ("probe", "cache", "flag")
FLAGS = ("on", "off")
# Where the probe cannot tell. It is also the nominal budget of its INT4 trial.
UNPROBED_BUDGET = 0.3
# Where nothing that was tried is safe.
FULL_BUDGET = 1.0


@dataclass(frozen=True)
class ProbeVerdict:
    """How strongly a model's KV may be coded.

    Attributes:
        int4: layers that may be sent at INT4 by policies that heed it.
        source: "probe": just found out. "cache": found out at an earlier start. "flag": said by the operator.
        reason: a sentence for people.
        trials: what INT4 rests on; none for a flag.
        settings: what was tried; none for a flag.

    Raises:
        InvalidArgumentError: it contradicts itself.
    """

    int4: Int4Layers
    source: str
    reason: str
    trials: tuple[ProbeTrial, ...] = ()
    settings: tuple[ProbedSetting, ...] = ()

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise InvalidArgumentError(f"the verdict's source is {self.source!r}; valid: {', '.join(SOURCES)}")
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
        if self.trials and self.int4.everywhere is not (is_conclusive(self.trials) and passes(self.trials)):
            raise InvalidArgumentError("the verdict on INT4 contradicts its trials")

    @classmethod
    def from_findings(
        cls, trials: Sequence[ProbeTrial], settings: Sequence[ProbedSetting], int4: Int4Layers, layers: int
    ) -> "ProbeVerdict":
        """Put a probe's findings together.

        Args:
            trials: three.
            settings: what was tried.
            int4: everywhere where the trials pass, and otherwise what is left of it.
            layers: of the model.

        Raises:
            InvalidArgumentError: they contradict each other.
        """
        reason = f"{_reason_of_int4(trials, int4, layers)}; {_reason_of_budget(settings)}"
        return cls(int4, "probe", reason, tuple(trials), tuple(settings))

    @classmethod
    def from_flag(cls, flag: str, layers: int) -> "ProbeVerdict":
        """Return the verdict that `--int4` "on" or "off" dictates for a model of `layers` layers.

        Raises:
            InvalidArgumentError: `flag` is neither.
        """
        if flag not in FLAGS:
            raise InvalidArgumentError(f"--int4 is {flag!r}; allowed: one of auto, {', '.join(FLAGS)}")
        int4 = Int4Layers() if flag == "on" else Int4Layers.nowhere(layers)
        return cls(int4, "flag", f"set by --int4 {flag}; nothing was probed, so budget auto is {UNPROBED_BUDGET:g}")

    @property
    def int4_allowed(self) -> bool:
        """Whether the model keeps its wits when tokens of all layers are sent at INT4."""
        return self.int4.everywhere

    @property
    def safe_budget(self) -> float | None:
        """The least counted budget known to be safe, with all larger ones; None where none is known."""
        return strongest_safe_budget(self.settings) if _finds_needles(self.settings) else None

    def default_budget(self, policy: Policy) -> float:
        """Return the budget of a request that names none, to a server whose operator left it open.

        Counted budgets are the strongest that is safe. A policy of tiers keeps to what it was tried at, if it was.
        """
        if policy.budget_kind is BudgetKind.TIER_COST:
            return next((one.budget for one in self.settings if one.policy == policy.name), UNPROBED_BUDGET)
        if not _finds_needles(self.settings):
            return UNPROBED_BUDGET
        return FULL_BUDGET if self.safe_budget is None else self.safe_budget

    def to_proto(self) -> prefill_pb2.ProbeVerdict:
        """The message that clients see and the cache keeps."""
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
        """Read the message.

        Raises:
            InvalidArgumentError: it contradicts itself.
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
            raise InvalidArgumentError("the verdict says of itself what does not follow from what was found")
        return verdict


def _finds_needles(settings: Sequence[ProbedSetting]) -> bool:
    return any(one.found_fp16 for one in settings)


def _reason_of_int4(trials: Sequence[ProbeTrial], int4: Int4Layers, layers: int) -> str:
    found = sum(trial.found for trial in trials)
    exact = sum(trial.found_fp16 for trial in trials)
    if not is_conclusive(trials):
        return (
            f"the model finds {exact} of {TRIALS} needles over its exact KV, so the probe can tell nothing about "
            "INT4; --int4 on allows it all the same"
        )
    counts = (
        f"with INT4 the model finds {found} of {TRIALS} needles, {TRIALS_TO_PASS} are wanted; "
        f"over its exact KV it finds {exact}"
    )
    if int4.everywhere:
        return counts
    if len(int4.off) == layers:
        return f"{counts}; doing without it in some layers does not mend that"
    where = f"layer{'s' if len(int4.off) > 1 else ''} {int4.off_list}"
    return f"{counts}; with INT8 in place of INT4 in {where} it finds enough"


def _reason_of_budget(settings: Sequence[ProbedSetting]) -> str:
    if not _finds_needles(settings):
        return f"without needles it cannot judge counted budgets, so budget auto stays {UNPROBED_BUDGET:g}"
    safe = strongest_safe_budget(settings)
    if safe is None:
        return f"no counted budget that was tried is safe, so budget auto is {FULL_BUDGET:g}"
    return f"counted budgets are safe from {safe:g} up"
