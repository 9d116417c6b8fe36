"""Run `spectrumkv-bench arrivals`: time the tokens of running streams while a long prompt's KV arrives."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from spectrumkv.bench.flags import (
    add_json_flag,
    add_kv_flags,
    add_model_flags,
    add_number_flags,
    given_options,
    kv_choices,
)
from spectrumkv.bench.report.console import plain_table, progress, results_console
from spectrumkv.bench.report.results import (
    check_destinations,
    describe_served_model,
    load_average,
    write_speed_result,
)
from spectrumkv.client.cli.output import STDOUT
from spectrumkv.client.client import SpectrumClient
from spectrumkv.client.local.pair_config import FREE_PORTS
from spectrumkv.client.local.running_pair import running_pair, stopped_by_signals
from spectrumkv.common.rpc.channel import open_channel


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "arrivals",
        help="tokens of running streams while a long prompt's KV arrives",
        description="Start both services, let streams generate on decode, send it the recorded KV of a long prompt "
        "repeatedly, and compare the gaps between tokens during arrivals with those in between.",
        allow_abbrev=False,
    )
    add_number_flags(
        parser,
        ("streams", 4, "running streams"),
        ("running-tokens", 64, "prompt tokens of each stream"),
        ("arriving-tokens", 2048, "prompt tokens of the KV that arrives"),
        ("arrivals", 20, "arrivals for each policy and budget"),
        ("pause-tokens", 8, "tokens of each stream between two arrivals"),
    )
    add_kv_flags(parser, policies=("native", "default"), budgets=(0.3,))
    add_model_flags(parser)
    add_json_flag(parser)
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure, show and write.

    Returns:
        The exit status, 0.

    Raises:
        InvalidArgumentError: a flag is wrong.
        SpectrumKVError: a service does not start, or decode refuses the KV.
    """
    # Loading torch takes seconds, so --help does without.
    from spectrumkv.bench.serving.arrivals import ArrivalLoad, measure

    check_destinations(arguments)
    load = ArrivalLoad(
        arguments.streams,
        arguments.running_tokens,
        arguments.arriving_tokens,
        arguments.arrivals,
        arguments.pause_tokens,
    )
    choices = kv_choices(arguments)
    load_before = load_average()
    options = {**FREE_PORTS, "int4": "on", **given_options(arguments, "model", "device", "dtype")}
    with stopped_by_signals(), running_pair(options) as pair:
        address = str(pair.decode.address)
        with SpectrumClient(address) as client:
            info = client.server_info()
        steps = len(choices) * load.arrivals
        with open_channel(address) as channel, progress(steps, Console(stderr=True)) as on_arrival:
            rows = measure(channel, info.model, choices, load, on_arrival)
    if arguments.json != STDOUT:
        results_console().print(arrivals_table(rows))
    if arguments.json is not None:
        write_speed_result(arguments.json, arguments, rows, describe_served_model(info), load_before)
    return 0


def arrivals_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of the rows."""
    table = plain_table(
        ("policy", "codec"),
        ("counted", "arrival ms", "ITL ms", "p99", "arriving: ITL", "p99", "p99 ÷ undisturbed"),
    )
    for row in rows:
        table.add_row(
            row["policy"],
            row["codec"],
            f"{row['budget_counted']:.4f}",
            f"{row['arrival_ms']:.0f}",
            f"{row['median_undisturbed_itl_ms']:.1f}",
            f"{row['p99_undisturbed_itl_ms']:.1f}",
            f"{row['median_arrival_itl_ms']:.1f}",
            f"{row['p99_arrival_itl_ms']:.1f}",
            f"{row['p99_itl_ratio']:.2f}",
        )
    table.caption = "gaps between tokens of running streams, between arrivals and during them"
    return table
