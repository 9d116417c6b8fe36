"""Run `spectrumkv-bench startup`: time how long `spectrumkv up` takes until both services are ready."""

import argparse
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from spectrumkv.bench.flags import add_json_flag, add_model_flags, given_options
from spectrumkv.bench.report.console import plain_table, progress, results_console
from spectrumkv.bench.report.results import check_destinations, load_average, write_speed_result
from spectrumkv.bench.timing import check_rounds
from spectrumkv.client.cli.output import STDOUT
from spectrumkv.client.local.pair_config import FREE_PORTS
from spectrumkv.common.errors import UnavailableError
from spectrumkv.common.service.config import flag_name

READY = "ready;"


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "startup",
        help="seconds from `spectrumkv up` to ready",
        description="Start `spectrumkv up` repeatedly and time how long both services take to be ready. The first "
        "start fills the caches and is reported separately.",
        allow_abbrev=False,
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="starts that count (default: %(default)s)")
    add_model_flags(parser)
    add_json_flag(parser)
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure, show and write.

    Returns:
        The exit status, 0.

    Raises:
        InvalidArgumentError: there are no rounds, or the rows could not be written.
        UnavailableError: the services did not start.
    """
    check_destinations(arguments)
    check_rounds(arguments.rounds)
    load_before = load_average()
    options = given_options(arguments, "model", "device", "dtype")
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
    """Return the table of the rows."""
    table = plain_table(("command",), ("first start s", "warm: median s", "slowest s"))
    for row in rows:
        table.add_row(
            row["command"],
            *(f"{row[f'{name}_ready_seconds']:.1f}" for name in ("first", "median", "max")),
        )
    table.caption = "from the start of the process until both services answer requests"
    return table


def seconds_to_ready(options: Mapping[str, str]) -> float:
    """Start `spectrumkv up` in a new process, wait until it is ready, and stop it.

    Args:
        options: options of both services, beside free ports.

    Returns:
        Seconds from the start of the process until both services answer requests.

    Raises:
        UnavailableError: the process ended before it was ready.
        RuntimeError: the process has no pipe to read from, which `subprocess` never does.
    """
    flags = [f"{flag_name(name)}={value}" for name, value in {**FREE_PORTS, **options}.items()]
    started = time.monotonic()
    process = subprocess.Popen(  # noqa: S603  # our own interpreter and module
        [sys.executable, "-u", "-m", "spectrumkv.client.cli.main", "up", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        if process.stdout is None:
            raise RuntimeError("the process was started without a pipe")
        for line in process.stdout:
            if line.startswith(READY):
                return time.monotonic() - started
        raise UnavailableError(
            f"`spectrumkv up {' '.join(flags)}` ended with status {process.wait()} before it was ready"
        )
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate()
