"""Run `spectrumkv-bench coding`: measure what encoding and decoding a prompt's KV takes beside its prefill."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from spectrumkv.bench.flags import add_json_flag, add_method_flags, add_model_flags
from spectrumkv.bench.report.console import method_cells, methods_table, progress, results_console
from spectrumkv.bench.report.results import check_destinations, describe_model, load_average, write_speed_result
from spectrumkv.bench.timing import check_rounds
from spectrumkv.client.cli.output import STDOUT
from spectrumkv.common.errors import InvalidArgumentError


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "coding",
        help="time to encode and decode a real prompt's KV, as a share of its prefill",
        description="Compute a prompt, then score, tier, encode and decode its KV by every method, in turn, many "
        "times; report medians and their share of the prefill's. Baselines, which send no messages, are left out.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--tokens", type=int, default=2048, metavar="N", help="tokens of the prompt (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds that count (default: %(default)s)")
    add_method_flags(parser)
    add_model_flags(parser)
    add_json_flag(parser)
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure, show and write.

    Returns:
        The exit status, 0.

    Raises:
        InvalidArgumentError: there are no rounds, or no method encodes.
        SpectrumKVError: the model or a method cannot be used.
    """
    # Loading torch takes seconds, so --help does without.
    from spectrumkv.bench.codec import coding
    from spectrumkv.bench.methods.preparation import prepare
    from spectrumkv.bench.methods.selection import Choice
    from spectrumkv.bench.methods.wire_method import WireMethod
    from spectrumkv.common.model.load import load_model

    check_destinations(arguments)
    check_rounds(arguments.rounds)
    load_before = load_average()
    choice = Choice.from_arguments(arguments)
    loaded = load_model(arguments.model, arguments.device, arguments.dtype)
    prepared = prepare(loaded, choice, arguments, arguments.tokens)
    methods = [method for method in prepared.methods if isinstance(method, WireMethod)]
    if not methods:
        raise InvalidArgumentError("--policies names only baselines, which do not encode; name a policy")
    with progress(arguments.rounds + 1, Console(stderr=True)) as on_step:
        rows = coding.measure(prepared.served, methods, arguments.tokens, arguments.rounds, on_step)
    if arguments.json != STDOUT:
        results_console().print(coding_table(rows))
    if arguments.json is not None:
        write_speed_result(arguments.json, arguments, rows, describe_model(loaded), load_before)
    return 0


def coding_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of the rows."""
    table = methods_table(("target", "encode ms", "decode ms", "÷ prefill", "processor ms", "÷ prefill's"))
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
