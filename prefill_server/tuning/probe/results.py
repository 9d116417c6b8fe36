"""What the probe measures, and which of it is safe."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.kv.policies import BudgetKind, policies

TRIALS = 3
TRIALS_TO_PASS = 2
MAX_SAFE_KL = 1e-4
"""Nats a token by which predictions over a safe setting's KV may diverge (docs/adr, ADR 39, says why so much)."""


@dataclass(frozen=True)
class ProbeTrial:
    """One needle-in-a-haystack question over KV at INT4.

    Attributes:
        prompt_tokens: length of the prompt.
        depth: where the needle was, from 0 (start) to 1 (end).
        found: whether the model found it over the received KV.
        found_fp16: whether it found it over the exact KV.
        answer: what it said over the received KV.
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
            raise InvalidArgumentError(f"a probe trial has its needle at depth {self.depth}; valid: 0 to 1")


@dataclass(frozen=True)
class ProbedSetting:
    """One way to code KV, held against the exact KV.

    Attributes:
        policy: name of the policy.
        codec: name of the codec.
        budget: in the policy's range.
        found_fp16: needles that the model finds over its exact KV.
        found: those among them that it finds over this KV, too.
        kl: mean divergence from the distributions over exact KV, in nats a token of prose; infinite where the model
            predicts nothing any more.
        ppl_delta_pct: by how many per cent perplexity of that prose is higher. Over n tokens it scatters by about
            the square root of 2 · kl / n, so that the probe's few hundred tell less by it than by `kl`.
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
                f"of {TRIALS} needles {self.found_fp16} are found over exact KV and {self.found} of these at budget "
                f"{self.budget:g}; neither can be more than the one before"
            )
        if math.isnan(self.kl) or math.isnan(self.ppl_delta_pct):
            raise InvalidArgumentError(f"the divergence at budget {self.budget:g} is no number")

    @property
    def safe(self) -> bool:
        """Whether what the model does over this KV cannot be told from what it does over the exact one."""
        return self.found == self.found_fp16 and self.kl <= MAX_SAFE_KL

    @property
    def budget_is_counted(self) -> bool:
        """Whether the budget is kept in bytes on the wire."""
        return policies.get(self.policy).budget_kind is BudgetKind.BYTES


def strongest_safe_budget(settings: Iterable[ProbedSetting]) -> float | None:
    """Return the least counted budget that is safe and so are all larger ones that were tried; None for none."""
    strongest = None
    for setting in sorted(settings, key=lambda one: one.budget, reverse=True):
        if setting.budget_is_counted:
            if not setting.safe:
                break
            strongest = setting.budget
    return strongest


def passes(trials: Sequence[ProbeTrial]) -> bool:
    """Whether at least two of three needles are found at INT4 (SpectrumKV, arXiv 2606.08635, INT4 probe)."""
    return sum(trial.found for trial in trials) >= TRIALS_TO_PASS


def is_conclusive(trials: Sequence[ProbeTrial]) -> bool:
    """Whether the model finds enough needles over its exact KV for them to tell anything about INT4."""
    return sum(trial.found_fp16 for trial in trials) >= TRIALS_TO_PASS
