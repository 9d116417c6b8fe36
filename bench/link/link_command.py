"""`spectrumkv-bench link`: hand-offs between network namespaces over a shaped link; root on Linux only."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from spectrumkv.bench.flags.destinations import check_destinations
from spectrumkv.bench.flags.method_flags import add_model_flags
from spectrumkv.bench.report.tables import results_console
from spectrumkv.client.cli.json_output import STDOUT
from spectrumkv.common.service.config import PrefillConfig

DEFAULT_RATES = (20.0, 200.0, 1000.0, 10000.0)
TIMELINE_RATE = 200.0


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "link",
        help="hand-off against bandwidth, over a shaped link (root on Linux)",
        description="Put the two services into network namespaces of their own, join them by a veth pair shaped with "
        "tc tbf, and send the same prompt at FP16 without and with overlap, at 0.5 and at 0.3.",
        allow_abbrev=False,
    )
    group = parser.add_argument_group("requests")
    group.add_argument(
        "--rates",
        type=parse_rates,
        default=DEFAULT_RATES,
        metavar="NUMBERS",
        help="bandwidths in Mb/s, separated by commas (default: 20,200,1000,10000)",
    )
    for name, default, what in (
        ("random-input-len", 2048, "tokens of the prompt"),
        ("random-output-len", 16, "tokens to generate"),
        ("rounds", 3, "requests at each bandwidth and setting"),
    ):
        group.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{what} (default: {default})")
    group.add_argument(
        "--int4", default=PrefillConfig.int4, metavar="WHEN", help="auto (ask the probe), on, off (default: auto)"
    )
    add_model_flags(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--json", metavar="FILE", help="write the rows as JSON ('-': stdout, instead of the table)")
    group.add_argument("--plot", metavar="FILE", help="draw TTFT and hand-off against bandwidth (.png, .svg or .pdf)")
    group.add_argument(
        "--timeline",
        metavar="FILE",
        help=f"draw one request's stages at {TIMELINE_RATE:g} Mb/s, or at the first bandwidth",
    )
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Do it.

    Raises:
        SpectrumKVError: this is no place for namespaces, or a service or a request failed.
    """
    # Loading torch takes seconds, which --help need not pay.
    from spectrumkv.bench.link import measure as link
    from spectrumkv.bench.link import network as link_network
    from spectrumkv.bench.report.progress import progress
    from spectrumkv.bench.report.speed_result import load_average, write_speed_result
    from spectrumkv.client.local.running_pair import stopped_by_sigterm

    check_destinations(arguments)
    link_network.check_privileges()
    load_before = load_average()
    options = {name: getattr(arguments, name) for name in ("model", "device", "dtype", "int4")}
    given = {name: value for name, value in options.items() if value is not None}
    with stopped_by_sigterm(), progress(len(arguments.rates), Console(stderr=True)) as on_rate:
        model, rows = link.measure(
            arguments.rates,
            arguments.random_input_len,
            arguments.random_output_len,
            arguments.rounds,
            given,
            on_rate,
        )
    if arguments.json != STDOUT:
        results_console().print(link_table(rows))
    if arguments.json is not None:
        write_speed_result(arguments.json, arguments, rows, model, load_before)
    _draw(arguments, rows, model["name"])
    return 0


def link_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table for people."""
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
    table.caption = "wire: frames ÷ bandwidth; floor: what of it outlasts the request's prefill, and one ITL"
    return table


def _setting(row: Mapping[str, Any]) -> str:
    """The setting, and the codecs that were used where the policy's name does not say them."""
    codecs = ", ".join(row["codecs"])
    return row["setting"] if codecs == row["policy"] else f"{row['setting']} ({codecs})"


def parse_rates(text: str) -> tuple[float, ...]:
    """Read "20,200".

    Raises:
        argparse.ArgumentTypeError: something in it is no number from 1 to 100 000.
    """
    try:
        rates = tuple(float(part) for part in text.split(","))
    except ValueError:
        rates = (0.0,)
    if not all(1 <= rate <= 1e5 for rate in rates):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: Mb/s from 1 to 100000, separated by commas")
    return rates


def _draw(arguments: argparse.Namespace, rows: Sequence[Mapping[str, Any]], model: str) -> None:
    from spectrumkv.bench.link import plots as link_plots

    prompt = f"{model}, {arguments.random_input_len} tokens"
    if arguments.plot is not None:
        link_plots.draw_bandwidths(rows, arguments.plot, prompt)
    if arguments.timeline is not None:
        rate = TIMELINE_RATE if TIMELINE_RATE in arguments.rates else arguments.rates[0]
        shown = [row for row in rows if row["rate_mbps"] == rate]
        link_plots.draw_timeline(shown, arguments.timeline, f"{prompt}, {rate:g} Mb/s")
