"""`spectrumkv-bench startup`: from `spectrumkv up` to ready."""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from spectrumkv.bench.flags.destinations import check_destinations
from spectrumkv.bench.flags.method_flags import add_model_flags
from spectrumkv.bench.report.tables import results_console
from spectrumkv.client.cli.json_output import STDOUT
from spectrumkv.common.errors import InvalidArgumentError


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "startup",
        help="seconds from `spectrumkv up` to ready",
        description="Start `spectrumkv up` again and again and time how long both services take to be ready. The "
        "first start fills the caches and is reported apart.",
        allow_abbrev=False,
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="starts that count (default: %(default)s)")
    add_model_flags(parser)
    parser.add_argument("--json", metavar="FILE", help="write the rows as JSON ('-': stdout, instead of the table)")
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Do it.

    Raises:
        InvalidArgumentError: there are no rounds, or the rows could not be written.
        UnavailableError: the services did not start.
    """
    from spectrumkv.bench.report.progress import progress
    from spectrumkv.bench.report.speed_result import load_average, write_speed_result
    from spectrumkv.bench.serving.startup import seconds_to_ready

    check_destinations(arguments)
    if arguments.rounds < 1:
        raise InvalidArgumentError(f"--rounds is {arguments.rounds}; allowed: 1 or more")
    load_before = load_average()
    given = {name: getattr(arguments, name) for name in ("model", "device", "dtype")}
    options = {name: value for name, value in given.items() if value is not None}
    seconds = []
    with progress(arguments.rounds + 1, Console(stderr=True)) as on_start:
        for number in range(arguments.rounds + 1):
            seconds.append(seconds_to_ready(options))
            on_start(f"start {number} of {arguments.rounds}")
    first, *warm = seconds
    row = {
        "command": "spectrumkv up",
        "rounds": arguments.rounds,
        "first_ready_seconds": first,
        "median_ready_seconds": statistics.median(warm),
        "max_ready_seconds": max(warm),
    }
    if arguments.json != STDOUT:
        results_console().print(startup_table([row]))
    if arguments.json is not None:
        write_speed_result(arguments.json, arguments, [row], None, load_before)
    return 0


def startup_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table for people."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    table.add_column("command")
    for heading in ("first start s", "warm: median s", "slowest s"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["command"],
            *(f"{row[f'{name}_ready_seconds']:.1f}" for name in ("first", "median", "max")),
        )
    table.caption = "from the start of the process until both services answer requests"
    return table
