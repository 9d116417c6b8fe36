"""Run `spectrumkv-bench goals`: compare runs of `quality` with the project's goal at each counted budget."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from spectrumkv.bench.report.console import results_console
from spectrumkv.bench.report.quality_runs import read_comparable
from spectrumkv.bench.report.results import check_destinations, write_result
from spectrumkv.client.cli.output import STDOUT
from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.service.config import PrefillConfig

Row = Mapping[str, Any]

# A method meets a budget if it uses at least this share of it, and never more than all of it.
LEAST_USE = 0.99
MET, WITHIN_ERROR, MISSED = "met", "within error", "missed"
# Reference policies run with the scorer and codec of the paper.
REFERENCE_SCORERS = ("", "attention")
REFERENCE_CODEC = "absmax"


@dataclass(frozen=True)
class Goal:
    """State the goal at a budget.

    Attributes:
        budget: the counted budget.
        delta_pct: largest Δ perplexity, in per cent.
        kl_ratio: largest KL, as a multiple of the reference's.
        reference: the reference policy.
        reference_budget: the target budget of the reference.
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
    """Compare a method's row with a goal.

    Attributes:
        goal: the goal.
        row: the method's row.
        reference: the row of the reference; None if the run has none.
        better: rows of other methods with less KL at the same or fewer counted bytes.
    """

    goal: Goal
    row: Row
    reference: Row | None
    better: tuple[Row, ...]

    @property
    def budget_verdict(self) -> str:
        """Return whether the method uses the budget and does not exceed it."""
        return MET if LEAST_USE <= self.row["budget_counted"] / self.goal.budget <= 1 else MISSED

    @property
    def delta_verdict(self) -> str:
        """Return whether Δ perplexity meets the goal, or the lower end of its confidence interval does."""
        if self.row["ppl_delta_pct"] <= self.goal.delta_pct:
            return MET
        interval = self.row["ppl_delta_pct_ci"]
        return WITHIN_ERROR if interval and interval[0] <= self.goal.delta_pct else MISSED

    @property
    def kl_ratio(self) -> float | None:
        """Return KL as a multiple of the reference's; None without a reference."""
        return None if self.reference is None else self.row["kl"] / self.reference["kl"]

    @property
    def kl_verdict(self) -> str | None:
        """Return whether KL meets the goal; None without a reference."""
        ratio = self.kl_ratio
        return None if ratio is None else MET if ratio <= self.goal.kl_ratio else MISSED

    def to_row(self) -> dict[str, Any]:
        """Return the row of the result file, whose keys are stable."""
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


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "goals",
        help="compare runs of quality with the goal at each counted budget",
        description="Compare a method's rows with the goals: bytes, Δ perplexity, KL as a multiple of a reference's "
        "in the same windows, and whether any other method has less KL at no more bytes.",
        allow_abbrev=False,
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="FILE", help="result file of quality")
    parser.add_argument(
        "--policy",
        default=PrefillConfig.policy,
        metavar="NAME",
        help="the method, optionally with a codec after a colon (default: %(default)s)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the rows as JSON ('-': stdout, instead of the table)")
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Compare, show and write.

    Returns:
        The exit status, 0.

    Raises:
        SpectrumKVError: a result cannot be read, the runs are not comparable, or they do not include the method.
    """
    check_destinations(arguments)
    results = read_comparable(arguments.results)
    policy, _, codec = arguments.policy.partition(":")
    outcomes = judge([row for result in results for row in result["rows"]], policy, codec)
    if arguments.json != STDOUT:
        results_console().print(goals_table(outcomes, arguments.policy))
    if arguments.json is not None:
        write_result(arguments.json, arguments, [one.to_row() for one in outcomes], results[0]["meta"]["model"])
    return 0


def goals_table(outcomes: Sequence[Outcome], method: str) -> Table:
    """Return the table of the outcomes."""
    table = Table(title=f"{method}, {outcomes[0].row['windows']} windows")
    for heading in ("budget", "counted", "Δ ppl %", "95 %", "KL", "KL ÷ reference's", "less KL at no more bytes"):
        table.add_column(heading)
    for one in outcomes:
        interval = one.row["ppl_delta_pct_ci"]
        table.add_row(
            f"{one.goal.budget:g}",
            f"{one.row['budget_counted']:.4f}: {one.budget_verdict}",
            f"{one.row['ppl_delta_pct']:+.3f}, goal {one.goal.delta_pct:+g}: {one.delta_verdict}",
            "" if interval is None else f"{interval[0]:+.3f} … {interval[1]:+.3f}",
            f"{one.row['kl']:.2e}",
            _against_reference(one),
            ", ".join(f"{row['policy']} at {row['budget_counted']:.3f}" for row in one.better) or "none",
        )
    return table


def _against_reference(outcome: Outcome) -> str:
    goal = outcome.goal
    name = f"{goal.reference} at {goal.reference_budget:g}"
    if outcome.kl_ratio is None:
        return f"{name}: not measured"
    return f"{_fraction(outcome.kl_ratio)} of {name}, goal {_fraction(goal.kl_ratio)}: {outcome.kl_verdict}"


def _fraction(ratio: float) -> str:
    return f"1/{1 / ratio:.3g}" if 0 < ratio < 1 else f"{ratio:.3g}"


def judge(rows: Sequence[Row], policy: str, codec: str) -> list[Outcome]:
    """Return the comparison of a method's rows with the goals at their budgets.

    Args:
        rows: rows of runs on the same windows.
        policy: the method's policy.
        codec: the method's codec; empty is any.

    Raises:
        InvalidArgumentError: the method has no row at any goal's budget, or several rows at one.
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
    """Return the reference's row; if there are several, the one with the least KL."""
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
    """Return the rows of other methods that have less KL at no more bytes."""
    return tuple(
        one
        for one in rows
        if one not in ours and one["budget_counted"] <= row["budget_counted"] and one["kl"] < row["kl"]
    )
