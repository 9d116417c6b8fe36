"""Run `spectrumkv-bench codec`: measure the bytes per second of every codec and tier, against memcpy."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from spectrumkv.bench.flags import add_geometry_flags, add_json_flag, geometry_from
from spectrumkv.bench.report.console import plain_table, progress, results_console
from spectrumkv.bench.report.results import check_destinations, load_average, write_speed_result
from spectrumkv.client.cli.output import STDOUT


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "codec",
        help="speed of every codec and tier, against memcpy",
        description="Encode and decode a synthetic KV cache with every codec at every tier, and with quanto where it "
        "is installed, in turn with a copy of as many bytes as the cache has at 16 bits; report medians.",
        allow_abbrev=False,
    )
    add_geometry_flags(parser)
    parser.add_argument("--device", default="auto", metavar="NAME", help="one of auto, cpu, cuda (default: auto)")
    parser.add_argument(
        "--rounds", type=int, default=15, metavar="N", help="rounds that count (default: %(default)s)"
    )
    add_json_flag(parser)
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure, show and write.

    Returns:
        The exit status, 0.

    Raises:
        SpectrumKVError: the geometry or the device cannot be used, or quanto's kernels cannot be loaded now.
    """
    # Loading torch takes seconds, so --help does without.
    from spectrumkv.bench.codec.measure import measure
    from spectrumkv.bench.codec.under_test import (
        add_ratios_to_quanto,
        kernels_under_test,
        quanto_codecs,
        registered_codecs,
    )
    from spectrumkv.bench.models.synthetic_prompt import SyntheticCache
    from spectrumkv.bench.peers.quanto import expect_extension
    from spectrumkv.common.model.load import choose_device

    check_destinations(arguments)
    load_before = load_average()
    cache = SyntheticCache.random(geometry_from(arguments), arguments.tokens, choose_device(arguments.device))
    console = Console(stderr=True, highlight=False)
    peers = quanto_codecs(cache)
    if peers:
        expect_extension(cache.device, console)
    under_test = [*registered_codecs(cache), *kernels_under_test(cache), *peers]
    with progress(arguments.rounds + 1, console) as on_round:
        rows = measure(cache, under_test, arguments.rounds, on_round)
    add_ratios_to_quanto(rows)
    if arguments.json != STDOUT:
        results_console().print(codec_table(rows))
    if arguments.json is not None:
        write_speed_result(arguments.json, arguments, rows, None, load_before)
    return 0


def codec_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of the rows."""
    ratios = ("÷ memcpy", "bandwidth", "÷ quanto")
    table = plain_table(("codec", "tier", "dtype", "device"), ("encode GB/s", *ratios, "decode GB/s", *ratios))
    for row in rows:
        table.add_row(
            *(Text(row[key]) for key in ("codec", "tier", "dtype", "device")),
            *_cells(row, "encode"),
            *_cells(row, "decode"),
        )
    if rows:
        table.caption = (
            f"GB of KV at 16 bits an element; memcpy {rows[0]['memcpy_gbps']:.2f} GB/s; "
            "bandwidth: bytes that a kernel reads and writes in a second ÷ those of memcpy"
        )
    return table


def _cells(row: Mapping[str, Any], direction: str) -> tuple[str, ...]:
    optional = (row[f"{direction}_bandwidth_ratio"], row[f"{direction}_ratio_to_quanto"])
    return (
        f"{row[f'{direction}_gbps']:.2f}",
        f"{row[f'{direction}_ratio']:.3f}",
        *("" if one is None else f"{one:.2f}" for one in optional),
    )
