"""Run `spectrumkv-bench vllm-link`: vLLM's hand-offs over a shaped link, beside NIXL (root on Linux)."""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from spectrumkv.bench.flags import add_json_flag, add_number_flags, parse_names
from spectrumkv.bench.link.link_command import add_rates_flag
from spectrumkv.bench.report.console import plain_table, progress, results_console
from spectrumkv.bench.report.results import check_destinations, load_average, write_speed_result
from spectrumkv.client.cli.output import STDOUT
from spectrumkv.common.errors import InvalidArgumentError

DEFAULT_RATES = (20.0, 200.0, 1000.0)


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "vllm-link",
        help="vLLM's hand-off against bandwidth, beside NixlConnector (root on Linux)",
        description="Start pairs of vLLM servers on CPUs in network namespaces, one with SpectrumKVConnector and "
        "one with NixlConnector, join these by a veth pair that tc tbf shapes, and send the same prompts to each "
        "through its proxy, and to one vLLM server.",
        allow_abbrev=False,
    )
    group = parser.add_argument_group("servers")
    group.add_argument(
        "--python",
        default="build/vllm/bin/python",
        metavar="FILE",
        help="interpreter of vLLM's environment (default: %(default)s, which make test-vllm makes)",
    )
    group.add_argument("--model", metavar="NAME", help="local directory or hub name (default: the embedded model)")
    group.add_argument(
        "--systems",
        type=parse_names,
        default=("vllm", "spectrumkv", "nixl"),
        metavar="NAMES",
        help="of vllm, spectrumkv and nixl, separated by commas (default: all)",
    )
    add_number_flags(group, ("cache-gib", 1, "GiB of each server's KV cache"))
    group.add_argument("--logs", type=Path, metavar="FOLDER", help="keep the servers' logs here")
    group = parser.add_argument_group("requests")
    add_rates_flag(group, DEFAULT_RATES)
    add_number_flags(
        group,
        ("random-input-len", 2048, "tokens of the prompt"),
        ("random-output-len", 8, "tokens to generate"),
        ("rounds", 3, "requests at each bandwidth and setting"),
    )
    group = parser.add_argument_group("output")
    add_json_flag(group)
    group.add_argument("--plot", metavar="FILE", help="draw the second token against bandwidth (.png, .svg or .pdf)")
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure, show, write and draw.

    Returns:
        The exit status, 0.

    Raises:
        SpectrumKVError: an argument is not allowed, namespaces cannot be made, or a server or a request failed.
    """
    from spectrumkv.bench.link.network import check_privileges
    from spectrumkv.bench.vllm.link.measure import measure
    from spectrumkv.bench.vllm.link.systems import Engines
    from spectrumkv.client.local.running_pair import stopped_by_signals
    from spectrumkv.common.model.files.configuration import read_config
    from spectrumkv.common.model.files.directory import find_model

    check_destinations(arguments)
    _check(arguments)
    check_privileges()
    name, directory = find_model(arguments.model)
    with tempfile.TemporaryDirectory() as temporary:
        logs = arguments.logs or Path(temporary)
        engines = Engines(str(Path(arguments.python).absolute()), directory, arguments.cache_gib, logs)
        engines.check(arguments.systems)
        load_before = load_average()
        with stopped_by_signals(), progress(len(arguments.rates), Console(stderr=True)) as on_step:
            rows = measure(
                arguments.systems,
                engines,
                arguments.rates,
                arguments.random_input_len,
                arguments.random_output_len,
                arguments.rounds,
                read_config(directory).vocab_size,
                on_step,
            )
    if arguments.json != STDOUT:
        results_console().print(link_table(rows))
    if arguments.json is not None:
        write_speed_result(
            arguments.json, arguments, rows, {"name": Path(name).name, "dtype": "float32"}, load_before
        )
    if arguments.plot is not None:
        from spectrumkv.bench.vllm.link.plot import draw

        draw(rows, arguments.plot, f"{Path(name).name}, {arguments.random_input_len} tokens, float32")
    return 0


def link_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of the rows.

    Args:
        rows: see `measure.rate_rows`.
    """
    numbers = ("Mb/s", "TTFT ms", "second token ms", "÷ NIXL", "link MB", "÷ NIXL")
    table = plain_table(("setting",), numbers)
    for row in rows:
        ratios = [row[f"{name}_ratio_to_nixl"] for name in ("second_token_ms", "link_bytes")]
        second, sent = ("" if one is None else f"{one:.3f}" for one in ratios)
        table.add_row(
            row["setting"],
            f"{row['rate_mbps']:g}",
            f"{row['ttft_ms']:.0f}",
            f"{row['second_token_ms']:.0f}",
            second,
            f"{row['link_bytes'] / 1e6:.2f}",
            sent,
        )
    table.caption = "times at the proxy, after the request was sent; bytes that left prefill's side, headers included"
    return table


def _check(arguments: argparse.Namespace) -> None:
    """Check the arguments.

    Raises:
        InvalidArgumentError: one is not allowed.
    """
    from spectrumkv.bench.vllm.link.systems import CONTEXT_TOKENS, SYSTEMS

    if unknown := [one for one in arguments.systems if one not in SYSTEMS]:
        raise InvalidArgumentError(f"--systems has {unknown[0]!r}; allowed: {', '.join(SYSTEMS)}")
    room = CONTEXT_TOKENS - arguments.random_output_len
    for flag, value, least, most in (
        ("--random-output-len", arguments.random_output_len, 3, 1024),
        ("--random-input-len", arguments.random_input_len, 1, room),
        ("--rounds", arguments.rounds, 1, 1000),
        ("--cache-gib", arguments.cache_gib, 1, 1024),
    ):
        if not least <= value <= most:
            raise InvalidArgumentError(f"{flag} is {value}; allowed: {least} to {most}")
    if arguments.logs is not None and not arguments.logs.is_dir():
        raise InvalidArgumentError(f"--logs {arguments.logs} is no folder; make it first")
