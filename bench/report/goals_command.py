"""`spectrumkv-bench goals`: runs of `quality` held against the goals at each counted budget."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from spectrumkv.bench.flags.destinations import check_destinations
from spectrumkv.bench.quality.result import read_result
from spectrumkv.bench.report.goals import Outcome, judge
from spectrumkv.bench.report.plot_command import check_comparable
from spectrumkv.bench.report.tables import results_console
from spectrumkv.client.cli.json_output import STDOUT
from spectrumkv.common.service.config import PrefillConfig


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "goals",
        help="hold runs of quality against the goals at each counted budget",
        description="Compare a method's rows with the goals: bytes, Δ perplexity, KL as a multiple of a reference's "
        "in the same windows, and whether any other method has less KL at no more bytes.",
        allow_abbrev=False,
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="FILE", help="JSON that quality wrote")
    parser.add_argument(
        "--policy",
        default=PrefillConfig.policy,
        metavar="NAME",
        help="the method, with a codec after a colon where it matters (default: %(default)s)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the rows as JSON ('-': stdout, instead of the table)")
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Do it.

    Raises:
        SpectrumKVError: a result cannot be read, the runs are not comparable, or the method is not in them.
    """
    check_destinations(arguments)
    results = [read_result(path) for path in arguments.results]
    check_comparable(arguments.results, results)
    policy, _, codec = arguments.policy.partition(":")
    outcomes = judge([row for result in results for row in result["rows"]], policy, codec)
    if arguments.json != STDOUT:
        results_console().print(goals_table(outcomes, arguments.policy))
    if arguments.json is not None:
        from spectrumkv.bench.report.meta import write_result

        write_result(arguments.json, arguments, [one.to_row() for one in outcomes], results[0]["meta"]["model"])
    return 0


def goals_table(outcomes: Sequence[Outcome], method: str) -> Table:
    """Return the table for people."""
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
