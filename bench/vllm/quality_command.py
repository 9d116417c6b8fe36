"""Run `spectrumkv-bench vllm-quality`: how far vLLM's predictions over received KV are from those over its own."""

import argparse

from rich.console import Console

from spectrumkv.bench.flags import add_json_flag, add_number_flags
from spectrumkv.bench.quality.quality_command import add_text_flags, quality_table
from spectrumkv.bench.report.console import WIDE_COLUMNS, progress, results_console
from spectrumkv.bench.report.results import check_destinations, write_result
from spectrumkv.bench.vllm.servers import add_scores_flag, add_server_flags
from spectrumkv.client.cli.output import STDOUT
from spectrumkv.common.errors import InvalidArgumentError

CIRCUMSTANCES = ("text_sha256", "context", "scored", "logprobs")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "vllm-quality",
        help="perplexity, KL and top-1 agreement of vLLM over KV from another vLLM, at counted bytes",
        description="Prefill the context of each window on one vLLM server, and have another decode the tokens after "
        "it over the KV that it gets through SpectrumKVConnector (docs/vllm.md); compare its log-probabilities with "
        "those over KV that it computed itself. Decode needs --max-logprobs, and --logits-processors "
        "spectrumkv.bench.vllm.forced_tokens:ForcedTokens.",
        allow_abbrev=False,
    )
    add_text_flags(parser)
    add_server_flags(parser, (0.5, 0.3, 0.25))
    add_number_flags(
        parser.add_argument_group("comparison"),
        ("logprobs", 4096, "most likely tokens whose log-probabilities are compared, the others as one; -1 is all"),
    )
    add_scores_flag(parser)
    add_json_flag(parser)
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure, show and write.

    Returns:
        The exit status, 0.

    Raises:
        InvalidArgumentError: `--logprobs` is not allowed.
        SpectrumKVError: a server does not answer, or the text cannot be used.
    """
    import torch

    from spectrumkv.bench.quality.kept_scores import KeptScores
    from spectrumkv.bench.quality.texts import cut, load_text, text_digest
    from spectrumkv.bench.vllm.engine import Engine, EnginePair
    from spectrumkv.bench.vllm.servers import measured_versions
    from spectrumkv.bench.vllm.windows import Setting, measure
    from spectrumkv.common.model.description import cache_geometry, read_tokenizer
    from spectrumkv.common.model.files.configuration import read_config
    from spectrumkv.common.model.files.directory import find_model

    check_destinations(arguments)
    if arguments.logprobs < -1 or arguments.logprobs == 0:
        raise InvalidArgumentError(f"--logprobs is {arguments.logprobs}; allowed: 1 or more, or -1 for all")
    text = load_text(arguments.text)
    arguments.text_sha256 = text_digest(text)
    _, directory = find_model(arguments.model)
    config = read_config(directory)
    windows = cut(
        read_tokenizer(directory, config),
        text,
        arguments.context,
        arguments.scored,
        arguments.skip_windows,
        arguments.windows,
    )
    pair = EnginePair(Engine.at(arguments.prefill), Engine.at(arguments.decode))
    settings = [Setting("native", 1.0), *(Setting("spectral", budget) for budget in arguments.budgets)]
    circumstances = {name: getattr(arguments, name) for name in CIRCUMSTANCES} | measured_versions(pair)
    kept = KeptScores(arguments.scores, circumstances, "vllm-quality")
    geometry = cache_geometry(config, torch.float16)
    with progress(len(windows) * (len(settings) + 1), Console(stderr=True)) as on_step:
        rows = measure(pair, windows, settings, arguments.logprobs, geometry, kept, on_step)
    if arguments.json != STDOUT:
        console = results_console()
        console.print(quality_table(rows, console.width >= WIDE_COLUMNS, "KV that decode computed"))
    if arguments.json is not None:
        write_result(arguments.json, arguments, rows, None)
    return 0
