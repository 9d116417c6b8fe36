"""`spectrumkv-bench coding`: what coding a prompt's KV costs beside computing the prompt."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from spectrumkv.bench.flags.destinations import check_destinations
from spectrumkv.bench.flags.method_flags import add_method_flags, add_model_flags
from spectrumkv.bench.report.tables import method_cells, results_console, results_table
from spectrumkv.client.cli.json_output import STDOUT
from spectrumkv.common.errors import InvalidArgumentError


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "coding",
        help="time to code a real prompt's KV, as a share of its prefill",
        description="Compute a prompt, then score, tier, encode and decode its KV by every method, in turn, many "
        "times; report medians and their share of the prompt's own. Baselines that send no messages are left out.",
        allow_abbrev=False,
    )
    parser.add_argument("--tokens", type=int, default=2048, metavar="N", help="of the prompt (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds that count (default: %(default)s)")
    add_method_flags(parser)
    add_model_flags(parser)
    parser.add_argument("--json", metavar="FILE", help="write the rows as JSON ('-': stdout, instead of the table)")
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Do it.

    Raises:
        SpectrumKVError: the model or a method cannot be used.
    """
    # Loading torch takes seconds, which --help need not pay.
    from spectrumkv.bench.codec import coding
    from spectrumkv.bench.methods.preparation import prepare
    from spectrumkv.bench.methods.selection import Choice
    from spectrumkv.bench.methods.wire_method import WireMethod
    from spectrumkv.bench.report.meta import describe_model
    from spectrumkv.bench.report.progress import progress
    from spectrumkv.bench.report.speed_result import load_average, write_speed_result
    from spectrumkv.common.model.load import load_model

    check_destinations(arguments)
    if arguments.rounds < 1:
        raise InvalidArgumentError(f"--rounds is {arguments.rounds}; allowed: 1 or more")
    load_before = load_average()
    choice = Choice.from_arguments(arguments)
    loaded = load_model(arguments.model, arguments.device, arguments.dtype)
    prepared = prepare(loaded, choice, arguments, arguments.tokens)
    methods = [method for method in prepared.methods if isinstance(method, WireMethod)]
    if not methods:
        raise InvalidArgumentError("--policies names baselines only, which encode nothing")
    with progress(arguments.rounds + 1, Console(stderr=True)) as on_step:
        rows = coding.measure(prepared.served, methods, arguments.tokens, arguments.rounds, on_step)
    if arguments.json != STDOUT:
        results_console().print(coding_table(rows))
    if arguments.json is not None:
        write_speed_result(arguments.json, arguments, rows, describe_model(loaded), load_before)
    return 0


def coding_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table for people."""
    table = results_table(("target", "encode ms", "decode ms", "÷ prefill", "processor ms", "÷ prefill's"))
    for row in rows:
        table.add_row(
            *method_cells(row),
            f"{row['budget_target']:g}",
            f"{1000 * row['encode_seconds']:.0f}",
            f"{1000 * row['decode_seconds']:.0f}",
            f"{row['share_of_prefill']:.3f}",
            f"{1000 * (row['encode_processor_seconds'] + row['decode_processor_seconds']):.0f}",
            f"{row['processor_share_of_prefill']:.3f}",
        )
    if rows:
        first = rows[0]
        table.caption = (
            f"{first['prompt_tokens']} tokens, prefill {1000 * first['prefill_seconds']:.0f} ms on the clock, "
            f"{1000 * first['prefill_processor_seconds']:.0f} ms of processors"
        )
    return table
