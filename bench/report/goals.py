"""What the project means to reach at each counted budget, and whether rows of `quality` reach it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spectrumkv.common.errors import InvalidArgumentError

Row = Mapping[str, Any]

# A budget is met from this share of it up, and never exceeded.
LEAST_USE = 0.99
MET, WITHIN_ERROR, MISSED = "met", "within error", "missed"
# Policies are compared with as the paper has them.
REFERENCE_SCORERS = ("", "attention")
REFERENCE_CODEC = "absmax"


@dataclass(frozen=True)
class Goal:
    """What is to be reached at a budget.

    Attributes:
        budget: counted.
        delta_pct: most Δ perplexity, in per cent.
        kl_ratio: most KL, as a multiple of the reference's.
        reference: policy that is compared with.
        reference_budget: at which target.
    """

    budget: float
    delta_pct: float
    kl_ratio: float
    reference: str
    reference_budget: float


GOALS = (
    Goal(0.50, 0.02, 1 / 10, "uniform-int8", 0.5),
    Goal(0.40, 0.03, 1 / 300, "greedy", 0.4),
    Goal(0.30, 0.05, 1 / 100, "greedy", 0.3),
    Goal(0.25, 0.1, 1 / 40, "uniform-int4", 0.25),
    Goal(0.20, 0.3, 1 / 3, "greedy", 0.4),
    Goal(0.15, 1.0, 1 / 2, "greedy", 0.3),
    Goal(0.10, 4.0, 1.0, "uniform-int4", 0.25),
)


@dataclass(frozen=True)
class Outcome:
    """A goal and what a method reached.

    Attributes:
        goal: the goal.
        row: the method's row.
        reference: the row that it is compared with; None where the run has none.
        better: rows of other methods with less KL at the same or fewer counted bytes.
    """

    goal: Goal
    row: Row
    reference: Row | None
    better: tuple[Row, ...]

    @property
    def budget_verdict(self) -> str:
        """Whether the budget is used up and not exceeded."""
        return MET if LEAST_USE <= self.row["budget_counted"] / self.goal.budget <= 1 else MISSED

    @property
    def delta_verdict(self) -> str:
        """Whether Δ perplexity is small enough, or its confidence interval reaches down to where it is."""
        if self.row["ppl_delta_pct"] <= self.goal.delta_pct:
            return MET
        interval = self.row["ppl_delta_pct_ci"]
        return WITHIN_ERROR if interval and interval[0] <= self.goal.delta_pct else MISSED

    @property
    def kl_ratio(self) -> float | None:
        """KL as a multiple of the reference's; None without a reference."""
        return None if self.reference is None else self.row["kl"] / self.reference["kl"]

    @property
    def kl_verdict(self) -> str | None:
        """Whether KL is small enough; None without a reference."""
        ratio = self.kl_ratio
        return None if ratio is None else MET if ratio <= self.goal.kl_ratio else MISSED

    def to_row(self) -> dict[str, Any]:
        """Return it with the keys that others script against."""
        return {
            "policy": self.row["policy"],
            "codec": self.row["codec"],
            "budget_target": self.goal.budget,
            "budget_counted": self.row["budget_counted"],
            "budget_verdict": self.budget_verdict,
            "ppl_delta_pct": self.row["ppl_delta_pct"],
            "ppl_delta_pct_ci": self.row["ppl_delta_pct_ci"],
            "ppl_delta_pct_limit": self.goal.delta_pct,
            "ppl_delta_verdict": self.delta_verdict,
            "kl": self.row["kl"],
            "kl_reference": self.goal.reference,
            "kl_reference_budget": self.goal.reference_budget,
            "kl_ratio": self.kl_ratio,
            "kl_ratio_limit": self.goal.kl_ratio,
            "kl_verdict": self.kl_verdict,
            "better": [[one["policy"], one["codec"], one["budget_counted"], one["kl"]] for one in self.better],
        }


def judge(rows: Sequence[Row], policy: str, codec: str) -> list[Outcome]:
    """Hold a method's rows against the goals at their budgets.

    Args:
        rows: of runs on the same windows.
        policy: the method's.
        codec: the method's; empty is any.

    Raises:
        InvalidArgumentError: the method has no row at any of the goals' budgets, or several at one.
    """
    ours = [row for row in rows if row["policy"] == policy and codec in ("", row["codec"])]
    outcomes = []
    for goal in GOALS:
        here = [row for row in ours if row["budget_target"] == goal.budget]
        if len(here) > 1:
            raise InvalidArgumentError(
                f"{policy!r} has {len(here)} rows at {goal.budget:g}, with codecs "
                f"{', '.join(sorted({row['codec'] for row in here}))}; name one as {policy}:CODEC, measured once"
            )
        outcomes += [Outcome(goal, row, _reference(rows, goal), _better(rows, ours, row)) for row in here]
    if not outcomes:
        measured = ", ".join(sorted({f"{row['policy']}:{row['codec']}" for row in rows}))
        raise InvalidArgumentError(f"no rows of {policy!r} at a goal's budget; measured are {measured}")
    return outcomes


def _reference(rows: Sequence[Row], goal: Goal) -> Row | None:
    """The reference's row; where a run has it in several settings, the best of them."""
    found = [
        row
        for row in rows
        if row["policy"] == goal.reference
        and row["codec"] == REFERENCE_CODEC
        and row["scorer"] in REFERENCE_SCORERS
        and row["budget_target"] == goal.reference_budget
    ]
    return min(found, key=lambda row: float(row["kl"]), default=None)


def _better(rows: Sequence[Row], ours: Sequence[Row], row: Row) -> tuple[Row, ...]:
    """Other methods' rows that have less KL at no more bytes."""
    return tuple(
        one
        for one in rows
        if one not in ours and one["budget_counted"] <= row["budget_counted"] and one["kl"] < row["kl"]
    )
