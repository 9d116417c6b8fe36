"""Run `spectrumkv-bench quality`: measure perplexity, KL and agreement against counted bytes."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from spectrumkv.bench.flags import add_method_flags, add_model_flags, add_number_flags, add_output_flags
from spectrumkv.bench.report.console import WIDE_COLUMNS, method_cells, methods_table, progress, results_console
from spectrumkv.bench.report.plot import draw_quality
from spectrumkv.bench.report.results import check_destinations, describe_model, versions, write_result
from spectrumkv.client.cli.output import STDOUT


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "quality",
        help="perplexity, KL and top-1 agreement over received KV, at counted bytes",
        description="Prefill the context of each window exactly and once; send its KV by every method as the "
        "services would; read the scored tokens over the received KV; compare with exact FP16 KV.",
        allow_abbrev=False,
    )
    add_text_flags(parser)
    add_method_flags(parser)
    parser.add_argument(
        "--reference",
        choices=("fp16", "native"),
        default="fp16",
        help="the KV that methods are compared with: at FP16, or as prefill computed it, as other engines' exact KV "
        "may be (default: %(default)s)",
    )
    add_model_flags(parser)
    add_output_flags(parser, "draw KL and Δ perplexity against counted bytes")
    parser.add_argument(
        "--scores",
        type=Path,
        metavar="FILE",
        help="keep every score here as soon as it is known; a run that was cut goes on where it ended, and one with "
        "more methods measures only those",
    )
    parser.set_defaults(run=run, parser=parser)


def add_text_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--text` and the flags that say how it is cut into windows."""
    group = parser.add_argument_group("text")
    group.add_argument(
        "--text",
        type=Path,
        required=True,
        metavar="TEXT",
        help="a file of UTF-8 text; 'code': Python's standard library; 'dialogue': answers of the default model",
    )
    add_number_flags(
        group,
        ("context", 1792, "tokens of each prompt"),
        ("scored", 256, "tokens scored after each prompt"),
        ("windows", 24, "windows to measure; 0 is all"),
        ("skip-windows", 0, "windows to skip at the start of the text"),
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure, show and write.

    Returns:
        The exit status, 0.

    Raises:
        SpectrumKVError: the text, the model or a method cannot be used.
    """
    # Loading torch and transformers takes seconds, so --help does without.
    from spectrumkv.bench.methods.method import REFERENCES
    from spectrumkv.bench.methods.preparation import check_peers, prepare
    from spectrumkv.bench.methods.selection import Choice
    from spectrumkv.bench.quality.kept_scores import KeptScores
    from spectrumkv.bench.quality.measure import measure, steps
    from spectrumkv.bench.quality.texts import cut, load_text, text_digest
    from spectrumkv.common.model.load import load_model

    check_destinations(arguments)
    choice = Choice.from_arguments(arguments)
    check_peers(choice, arguments.device)
    text = load_text(arguments.text)
    arguments.text_sha256 = text_digest(text)
    loaded = load_model(arguments.model, arguments.device, arguments.dtype)
    windows = cut(
        loaded.tokenizer, text, arguments.context, arguments.scored, arguments.skip_windows, arguments.windows
    )
    prepared = prepare(loaded, choice, arguments, arguments.context + arguments.scored)
    kept = KeptScores(arguments.scores, _circumstances(arguments, describe_model(loaded)))
    with progress(steps(len(windows), len(prepared.methods)), Console(stderr=True)) as on_step:
        reference = REFERENCES[arguments.reference]
        rows = measure(prepared.served, windows, prepared.methods, kept, on_step, reference)
    if arguments.json != STDOUT:
        console = results_console()
        shown = "exact FP16 KV" if arguments.reference == "fp16" else "prefill's own KV"
        console.print(quality_table(rows, intervals=console.width >= WIDE_COLUMNS, reference=shown))
    if arguments.json is not None:
        write_result(arguments.json, arguments, rows, describe_model(loaded))
    if arguments.plot is not None:
        draw_quality(rows, arguments.plot, loaded.name)
    return 0


def _circumstances(arguments: argparse.Namespace, model: Mapping[str, Any]) -> dict[str, Any]:
    """Return what all scores in a file of `--scores` have in common."""
    from spectrumkv.bench.quality.kept_scores import sources_digest

    chosen = {
        name: getattr(arguments, name) for name in ("text_sha256", "context", "scored", "int4", "seed", "reference")
    }
    return chosen | {"model": dict(model), "versions": versions(), "sources": sources_digest()}


def quality_table(rows: Sequence[Mapping[str, Any]], intervals: bool, reference: str = "exact FP16 KV") -> Table:
    """Return the table of the rows.

    Args:
        rows: the rows, at least one.
        intervals: whether to show confidence intervals.
        reference: the KV that methods are compared with.
    """
    table = methods_table(
        ("target", "counted", "Δ ppl %", *(("95 %",) * intervals), "KL", *(("95 %",) * intervals), "top-1")
    )
    for row in rows:
        delta_interval = (_interval(row["ppl_delta_pct_ci"], "+.2f"),) * intervals
        kl_interval = (_interval(row["kl_ci"], ".1e"),) * intervals
        table.add_row(
            *method_cells(row),
            f"{row['budget_target']:g}",
            f"{row['budget_counted']:.4f}",
            f"{row['ppl_delta_pct']:+.3f}",
            *delta_interval,
            f"{row['kl']:.2e}",
            *kl_interval,
            f"{row['top1_agreement']:.4f}",
        )
    table.caption = f"{rows[0]['windows']} windows, perplexity over {reference} {rows[0]['ppl_fp16']:.3f}"
    return table


def _interval(bounds: Sequence[float] | None, form: str) -> str:
    return "" if bounds is None else f"{bounds[0]:{form}} … {bounds[1]:{form}}"
