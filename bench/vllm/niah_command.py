"""Run `spectrumkv-bench vllm-niah`: count the needles that vLLM finds over KV that came from another vLLM."""

import argparse
from typing import Any

from rich.console import Console
from rich.table import Table

from spectrumkv.bench.flags import add_json_flag, add_number_flags
from spectrumkv.bench.report.console import progress, results_console
from spectrumkv.bench.report.results import check_destinations, write_result
from spectrumkv.bench.vllm.servers import add_scores_flag, add_server_flags
from spectrumkv.client.cli.output import STDOUT


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "vllm-niah",
        help="needles that vLLM finds over KV from another vLLM, at counted bytes",
        description="Hide a fact at each depth of a long prompt, prefill it on one vLLM server, and ask for it on "
        "another, which gets the KV through SpectrumKVConnector (docs/vllm.md). Both serve the same model.",
        allow_abbrev=False,
    )
    add_server_flags(parser, (0.3, 0.25))
    add_number_flags(
        parser.add_argument_group("haystack"),
        ("context", 2048, "tokens of prompt and question"),
        ("depths", 19, "depths of the needle, evenly spaced"),
        ("needles", 1, "needles at each depth"),
    )
    add_scores_flag(parser)
    add_json_flag(parser)
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure, show and write.

    Returns:
        The exit status, 0.

    Raises:
        SpectrumKVError: a server does not answer, or the haystack does not fit.
    """
    import torch

    from spectrumkv.bench.quality import niah
    from spectrumkv.bench.report.kept_outcomes import KeptOutcomes
    from spectrumkv.bench.vllm.engine import Engine, EnginePair
    from spectrumkv.bench.vllm.needles import Answer, ask_all
    from spectrumkv.bench.vllm.servers import measured_versions
    from spectrumkv.common.model.description import cache_geometry, read_tokenizer
    from spectrumkv.common.model.files.configuration import read_config
    from spectrumkv.common.model.files.directory import find_model

    check_destinations(arguments)
    _, directory = find_model(arguments.model)
    config = read_config(directory)
    tokenizer = read_tokenizer(directory, config)
    prompts = niah.needle_prompts(tokenizer, arguments.context, arguments.depths, arguments.needles, "prompt")
    pair = EnginePair(Engine.at(arguments.prefill), Engine.at(arguments.decode))
    settings: list[dict[str, Any]] = [{"policy": "native"}]
    settings += [{"policy": "spectral", "budget": budget} for budget in arguments.budgets]
    kept = KeptOutcomes(
        Answer,
        "a file that vllm-niah wrote with the same haystack, models and versions, or a new one",
        arguments.scores,
        {name: getattr(arguments, name) for name in ("context", "depths", "needles")} | measured_versions(pair),
    )
    with progress(len(prompts) * len(settings), Console(stderr=True)) as on_step:
        rows = ask_all(pair, prompts, settings, cache_geometry(config, torch.float16), kept, on_step)
    if arguments.json != STDOUT:
        results_console().print(_table(rows))
    if arguments.json is not None:
        write_result(arguments.json, arguments, rows, None)
    return 0


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("policy", "budget", "counted", "found", "of", "prompt tokens", "computed by decode")
    for row in rows:
        table.add_row(
            row["policy"],
            f"{row.get('budget', 1.0):g}",
            f"{row['budget_counted']:.4f}",
            str(row["found"]),
            str(row["total"]),
            str(row["prompt_tokens"]),
            f"{row['tokens_computed']:g}",
        )
    return table
