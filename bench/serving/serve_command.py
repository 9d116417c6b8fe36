"""Run `spectrumkv-bench serve`: measure latencies and throughput of the pair, beside one process of transformers."""

import argparse
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from spectrumkv.bench.flags import (
    add_json_flag,
    add_kv_flags,
    add_model_flags,
    add_number_flags,
    given_options,
    kv_choices,
)
from spectrumkv.bench.report.console import plain_table, progress, results_console
from spectrumkv.bench.report.results import (
    check_destinations,
    describe_served_model,
    load_average,
    write_speed_result,
)
from spectrumkv.client.cli.output import STDOUT
from spectrumkv.common.service.config import DecodeConfig, PrefillConfig

if TYPE_CHECKING:
    from spectrumkv.bench.serving.serve import Contender
    from spectrumkv.client.client import SpectrumClient

BASELINES = ("aggregated", "none")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "serve",
        help="latencies and throughput, beside one process of transformers",
        description="Start both services on this machine and one process of transformers, offer the same requests to "
        "each in turn, and report the latencies that clients see, by the definitions of `vllm bench serve`.",
        allow_abbrev=False,
    )
    group = parser.add_argument_group("requests")
    add_number_flags(
        group,
        ("num-prompts", 8, "requests of a round"),
        ("random-input-len", 1024, "tokens of each prompt"),
        ("random-output-len", 32, "tokens that each request generates"),
        ("max-concurrency", 1, "requests that run at once; 0 is all"),
        ("rounds", 3, "how often each system serves the requests"),
        ("seed", 0, "seed of prompts and arrivals"),
    )
    group.add_argument(
        "--request-rate",
        type=parse_rate,
        metavar="R",
        help="requests per second, at random times; inf is all at once (default: inf)",
    )
    group.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="BOUND",
        help="bounds of a good request: ttft:MS, tpot:MS, e2el:MS",
    )
    parser.add_argument(
        "--baseline", choices=BASELINES, default="aggregated", help="system to compare with (default: %(default)s)"
    )
    add_kv_flags(parser, policies=("native", "default"), budgets=(0.3,))
    add_model_flags(parser)
    group = parser.add_argument_group("services")
    group.add_argument(
        "--int4", default=PrefillConfig.int4, metavar="WHEN", help="auto (ask the probe), on, off (default: auto)"
    )
    group.add_argument(
        "--kv-memory",
        default=str(DecodeConfig.kv_memory),
        metavar="BYTES",
        help="memory of the KV pool, such as 4GiB (default: %(default)s)",
    )
    add_json_flag(parser)
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure, show and write.

    Returns:
        The exit status, 0.

    Raises:
        SpectrumKVError: a flag is wrong, or a system does not start.
    """
    # Loading torch takes seconds, so --help does without.
    from spectrumkv.bench.serving.load import Workload
    from spectrumkv.bench.serving.metrics import Goodput
    from spectrumkv.bench.serving.serve import measure
    from spectrumkv.client.local.running_pair import stopped_by_signals

    check_destinations(arguments)
    load_before = load_average()
    goodput, choices = Goodput.parse(arguments.goodput), kv_choices(arguments)
    with stopped_by_signals(), ExitStack() as running:
        client = _start_pair(arguments, running)
        info: Any = client.server_info()
        workload = Workload.random(
            arguments.num_prompts,
            arguments.random_input_len,
            arguments.random_output_len,
            arguments.request_rate,
            arguments.max_concurrency or None,
            info.model.vocab_size,
            arguments.seed,
        )
        contenders = _contenders(arguments, running, client, choices, workload.max_concurrency)
        steps = len(contenders) * arguments.rounds * arguments.num_prompts
        with progress(steps, Console(stderr=True)) as on_request:
            rows = measure(workload, contenders, arguments.rounds, goodput, on_request)
    if arguments.json != STDOUT:
        results_console().print(serve_table(rows))
    if arguments.json is not None:
        write_speed_result(arguments.json, arguments, rows, describe_served_model(info), load_before)
    return 0


def serve_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of the rows."""
    latencies = ("TTFT ms", "÷ baseline", "hand-off ms", "÷ ITL", "ITL ms", "p99", "TPOT ms")
    table = plain_table(("system",), ("counted", *latencies, "tokens/s", "decoding", "failed"))
    for row in rows:
        named = (row["system"], row["policy"], row["budget_target"])
        cells = [
            _number(row["budget_counted"], ".4f"),
            _number(row["median_ttft_ms"], ".0f"),
            _number(row["median_ttft_ms_ratio"], ".3f"),
            _number(row["median_handoff_ms"], ".1f"),
            _number(row["handoff_itl_ratio"], ".2f"),
            _number(row["median_itl_ms"], ".1f"),
            _number(row["p99_itl_ms"], ".1f"),
            _number(row["median_tpot_ms"], ".1f"),
            _number(row["output_throughput"], ".2f"),
            _number(row["decode_throughput"], ".2f"),
            str(row["failed"]),
        ]
        table.add_row(Text(" ".join(str(one) for one in named if one is not None)), *cells)
    table.caption = "medians of all requests; decoding: tokens/s after each request's first token"
    return table


def parse_rate(text: str) -> float | None:
    """Return the number of requests per second in a text; None stands for "inf".

    Raises:
        argparse.ArgumentTypeError: the text is neither.
    """
    if text == "inf":
        return None
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: a positive number of requests per second, or inf")
    return rate


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _start_pair(arguments: argparse.Namespace, running: ExitStack) -> "SpectrumClient":
    from spectrumkv.client.client import SpectrumClient
    from spectrumkv.client.local.pair_config import FREE_PORTS
    from spectrumkv.client.local.running_pair import running_pair

    given = given_options(arguments, "model", "device", "dtype", "int4", "kv_memory")
    pair = running.enter_context(running_pair({**FREE_PORTS, **given}))
    return running.enter_context(SpectrumClient(pair.address))


def _contenders(
    arguments: argparse.Namespace,
    running: ExitStack,
    client: "SpectrumClient",
    choices: Sequence[Any],
    max_batch: int,
) -> "list[Contender]":
    from spectrumkv.bench.serving import serve
    from spectrumkv.bench.serving.aggregated import aggregated_process

    contenders = [serve.spectrum_contender(client, choice) for choice in choices]
    if arguments.baseline == "aggregated":
        tokens = arguments.random_input_len + arguments.random_output_len
        process = aggregated_process(arguments.model, arguments.device, arguments.dtype, max_batch, tokens)
        contenders.append(serve.aggregated_contender(running.enter_context(process)))
    return contenders
