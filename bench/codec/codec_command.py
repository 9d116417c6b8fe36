"""`spectrumkv-bench codec`: bytes per second of every codec and tier, against memcpy."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from spectrumkv.bench.flags.destinations import check_destinations
from spectrumkv.bench.flags.geometry_flags import add_geometry_flags, geometry_from
from spectrumkv.bench.report.tables import results_console
from spectrumkv.client.cli.json_output import STDOUT


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "codec",
        help="speed of every codec and tier, against memcpy",
        description="Encode and decode a synthetic KV cache with every codec at every tier, and with quanto where it "
        "is installed; copy as many bytes as the cache has at 16 bits beside them, in turn; report medians.",
        allow_abbrev=False,
    )
    add_geometry_flags(parser)
    parser.add_argument("--device", default="auto", metavar="NAME", help="one of auto, cpu, cuda (default: auto)")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="rounds (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the rows as JSON ('-': stdout, instead of the table)")
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Do it.

    Raises:
        SpectrumKVError: the geometry or the device cannot be used, or quanto's kernels cannot be loaded now.
    """
    # Loading torch takes seconds, which --help need not pay.
    from spectrumkv.bench.codec import measure as codec
    from spectrumkv.bench.codec.kernels import kernels_under_test
    from spectrumkv.bench.codec.quanto import add_ratios_to_quanto, quanto_codecs
    from spectrumkv.bench.peers.quanto_extension import expect_extension
    from spectrumkv.bench.report.progress import progress
    from spectrumkv.bench.report.speed_result import load_average, write_speed_result
    from spectrumkv.common.model.load import choose_device

    check_destinations(arguments)
    load_before = load_average()
    cache = codec.Cache.random(geometry_from(arguments), arguments.tokens, choose_device(arguments.device))
    console = Console(stderr=True, highlight=False)
    peers = quanto_codecs(cache)
    if peers:
        expect_extension(cache.device, console)
    under_test = [*codec.registered_codecs(cache), *kernels_under_test(cache), *peers]
    with progress(arguments.rounds + 1, console) as on_round:
        rows = codec.measure(cache, under_test, arguments.rounds, on_round)
    add_ratios_to_quanto(rows)
    if arguments.json != STDOUT:
        results_console().print(codec_table(rows))
    if arguments.json is not None:
        write_speed_result(arguments.json, arguments, rows, None, load_before)
    return 0


def codec_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table for people."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    for heading in ("codec", "tier", "dtype", "device"):
        table.add_column(heading)
    for direction in ("encode", "decode"):
        for heading in (f"{direction} GB/s", "÷ memcpy", "bandwidth", "÷ quanto"):
            table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            *(Text(row[key]) for key in ("codec", "tier", "dtype", "device")),
            *_cells(row, "encode"),
            *_cells(row, "decode"),
        )
    if rows:
        table.caption = (
            f"GB of KV at 16 bits an element; memcpy {rows[0]['memcpy_gbps']:.2f} GB/s; "
            "bandwidth: bytes that a kernel reads and writes in a second, of those that memcpy does"
        )
    return table


def _cells(row: Mapping[str, Any], direction: str) -> tuple[str, ...]:
    rarely = (row[f"{direction}_bandwidth_ratio"], row[f"{direction}_ratio_to_quanto"])
    return (
        f"{row[f'{direction}_gbps']:.2f}",
        f"{row[f'{direction}_ratio']:.3f}",
        *("" if one is None else f"{one:.2f}" for one in rarely),
    )
