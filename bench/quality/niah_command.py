"""Run `spectrumkv-bench niah`: count the needles that are found over received KV, at counted bytes."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from spectrumkv.bench.flags import add_method_flags, add_model_flags, add_number_flags, add_output_flags
from spectrumkv.bench.report.console import method_cells, methods_table, progress, results_console
from spectrumkv.bench.report.plot import draw_niah
from spectrumkv.bench.report.results import check_destinations, describe_model, write_result
from spectrumkv.client.cli.output import STDOUT


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "niah",
        help="needles found in a haystack over received KV, at counted bytes",
        description="Hide a fact at each depth of a long prompt, prefill it exactly and once, send its KV by every "
        "method as the services would, and ask for the fact over the received KV.",
        allow_abbrev=False,
    )
    group = parser.add_argument_group("haystack")
    add_number_flags(
        group,
        ("context", 2048, "tokens of prompt and question"),
        ("depths", 19, "depths of the needle, evenly spaced"),
        ("needles", 5, "needles at each depth"),
    )
    group.add_argument(
        "--question",
        default="prompt",
        metavar="WHERE",
        help="'prompt': question in the prompt; 'late': question after the KV was sent (default: %(default)s)",
    )
    add_method_flags(parser)
    add_model_flags(parser)
    add_output_flags(parser, "draw the needles found by depth and budget")
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure, show and write.

    Returns:
        The exit status, 0.

    Raises:
        SpectrumKVError: the haystack, the model or a method cannot be used.
    """
    # Loading torch and transformers takes seconds, so --help does without.
    from spectrumkv.bench.methods.preparation import check_peers, prepare
    from spectrumkv.bench.methods.selection import Choice
    from spectrumkv.bench.quality import measure as quality
    from spectrumkv.bench.quality import niah
    from spectrumkv.common.model.load import load_model

    check_destinations(arguments)
    choice = Choice.from_arguments(arguments)
    check_peers(choice, arguments.device)
    loaded = load_model(arguments.model, arguments.device, arguments.dtype)
    prompts = niah.needle_prompts(
        loaded.tokenizer, arguments.context, arguments.depths, arguments.needles, arguments.question
    )
    prepared = prepare(loaded, choice, arguments, arguments.context + niah.ANSWER_TOKENS)
    with progress(quality.steps(len(prompts), len(prepared.methods)), Console(stderr=True)) as on_step:
        rows = niah.measure(prepared.served, prompts, prepared.methods, on_step)
    if arguments.json != STDOUT:
        results_console().print(niah_table(rows))
    if arguments.json is not None:
        write_result(arguments.json, arguments, rows, describe_model(loaded))
    if arguments.plot is not None:
        draw_niah(rows, arguments.plot, f"{loaded.name}, question: {arguments.question}")
    return 0


def niah_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of the rows."""
    table = methods_table(("target", "counted", "found", "FP16 finds", "of"))
    table.add_column("found by depth")
    for row in rows:
        table.add_row(
            *method_cells(row),
            f"{row['budget_target']:g}",
            f"{row['budget_counted']:.4f}",
            str(row["found"]),
            str(row["found_fp16"]),
            str(row["total"]),
            " ".join(str(depth["found"]) for depth in row["by_depth"]),
        )
    return table
