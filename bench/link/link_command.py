"""Run `spectrumkv-bench link`: measure hand-offs between network namespaces over a shaped link (root on Linux)."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from spectrumkv.bench.flags import add_json_flag, add_model_flags, add_number_flags, given_options
from spectrumkv.bench.report.console import progress, results_console
from spectrumkv.bench.report.results import check_destinations, load_average, write_speed_result
from spectrumkv.client.cli.output import STDOUT
from spectrumkv.common.service.config import PrefillConfig

DEFAULT_RATES = (20.0, 200.0, 1000.0, 10000.0)
TIMELINE_RATE = 200.0


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "link",
        help="hand-off against bandwidth, over a shaped link (root on Linux)",
        description="Start the two services in network namespaces of their own, join these by a veth pair that tc "
        "tbf shapes, and send the same prompt at FP16 without and with overlap, at 0.5 and at 0.3.",
        allow_abbrev=False,
    )
    group = parser.add_argument_group("requests")
    add_rates_flag(group, DEFAULT_RATES)
    add_number_flags(
        group,
        ("random-input-len", 2048, "tokens of the prompt"),
        ("random-output-len", 16, "tokens to generate"),
        ("rounds", 3, "requests at each bandwidth and setting"),
    )
    group.add_argument(
        "--int4", default=PrefillConfig.int4, metavar="WHEN", help="auto (ask the probe), on, off (default: auto)"
    )
    add_model_flags(parser)
    group = parser.add_argument_group("output")
    add_json_flag(group)
    group.add_argument("--plot", metavar="FILE", help="draw TTFT and hand-off against bandwidth (.png, .svg or .pdf)")
    group.add_argument(
        "--timeline",
        metavar="FILE",
        help=f"draw one request's stages at {TIMELINE_RATE:g} Mb/s, or at the first bandwidth",
    )
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure, show, write and draw.

    Returns:
        The exit status, 0.

    Raises:
        SpectrumKVError: namespaces cannot be made here, or a service or a request failed.
    """
    # Loading torch takes seconds, so --help does without.
    from spectrumkv.bench.link.measure import measure
    from spectrumkv.bench.link.network import check_privileges
    from spectrumkv.client.local.running_pair import stopped_by_signals

    check_destinations(arguments)
    check_privileges()
    load_before = load_average()
    options = given_options(arguments, "model", "device", "dtype", "int4")
    with stopped_by_signals(), progress(len(arguments.rates), Console(stderr=True)) as on_rate:
        model, rows = measure(
            arguments.rates,
            arguments.random_input_len,
            arguments.random_output_len,
            arguments.rounds,
            options,
            on_rate,
        )
    if arguments.json != STDOUT:
        results_console().print(link_table(rows))
    if arguments.json is not None:
        write_speed_result(arguments.json, arguments, rows, model, load_before)
    _draw(arguments, rows, model["name"])
    return 0


def link_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of the rows."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    table.add_column("Mb/s", justify="right")
    table.add_column("setting")
    for heading in (
        "counted",
        "wire ms",
        "prefill ms",
        "TTFT ms",
        "hand-off ms",
        "÷ floor",
        "÷ no overlap",
        "ITL ms",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            f"{row['rate_mbps']:g}",
            Text(_setting(row)),
            f"{row['budget_counted']:.4f}",
            f"{row['wire_ms']:.0f}",
            f"{row['prefill_ms']:.0f}",
            f"{row['ttft_ms']:.0f}",
            f"{row['handoff_ms']:.0f}",
            f"{row['handoff_floor_ratio']:.2f}",
            f"{row['handoff_ratio_to_sequential']:.3f}",
            f"{row['itl_ms']:.0f}",
        )
    table.caption = "wire: frames ÷ bandwidth; floor: the part of the wire after the request's prefill, and one ITL"
    return table


def _setting(row: Mapping[str, Any]) -> str:
    """Return the setting, with the codecs that were used if they differ from the policy's name."""
    codecs = ", ".join(row["codecs"])
    return row["setting"] if codecs == row["policy"] else f"{row['setting']} ({codecs})"


def add_rates_flag(group: argparse._ArgumentGroup, default: tuple[float, ...]) -> None:
    """Add `--rates`, the bandwidths that the link is shaped to.

    Args:
        group: of a command's parser.
        default: in Mb/s.
    """
    group.add_argument(
        "--rates",
        type=parse_rates,
        default=default,
        metavar="NUMBERS",
        help=f"bandwidths in Mb/s, separated by commas (default: {','.join(f'{rate:g}' for rate in default)})",
    )


def parse_rates(text: str) -> tuple[float, ...]:
    """Return the rates in a text such as "20,200".

    Raises:
        argparse.ArgumentTypeError: a rate is not a number from 1 to 100000.
    """
    try:
        rates = tuple(float(part) for part in text.split(","))
    except ValueError:
        rates = (0.0,)
    if not all(1 <= rate <= 1e5 for rate in rates):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: Mb/s from 1 to 100000, separated by commas")
    return rates


def _draw(arguments: argparse.Namespace, rows: Sequence[Mapping[str, Any]], model: str) -> None:
    from spectrumkv.bench.link import plots

    prompt = f"{model}, {arguments.random_input_len} tokens"
    if arguments.plot is not None:
        plots.draw_bandwidths(rows, arguments.plot, prompt)
    if arguments.timeline is not None:
        rate = TIMELINE_RATE if TIMELINE_RATE in arguments.rates else arguments.rates[0]
        shown = [row for row in rows if row["rate_mbps"] == rate]
        plots.draw_timeline(shown, arguments.timeline, f"{prompt}, {rate:g} Mb/s")
