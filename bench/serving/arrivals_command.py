"""Run `spectrumkv-bench arrivals`: time the tokens of running streams while a long prompt's KV arrives."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from spectrumkv.bench.flags import add_json_flag, add_kv_flags, add_model_flags, given_options, kv_choices
from spectrumkv.bench.report.console import plain_table, progress, results_console
from spectrumkv.bench.report.results import (
    check_destinations,
    describe_served_model,
    load_average,
    write_speed_result,
)
from spectrumkv.client.cli.output import STDOUT
from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.service.config import PrefillConfig

# Upper bound of the tokens that a stream generates during one arrival.
TOKENS_PER_ARRIVAL = 64


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "arrivals",
        help="tokens of running streams while a long prompt's KV arrives",
        description="Start both services, let streams generate on decode, send it the recorded KV of a long prompt "
        "repeatedly, and compare the gaps between tokens during arrivals with those in between.",
        allow_abbrev=False,
    )
    for name, default, what in (
        ("streams", 4, "running streams"),
        ("running-tokens", 64, "prompt tokens of each stream"),
        ("arriving-tokens", 2048, "prompt tokens of the KV that arrives"),
        ("arrivals", 20, "arrivals for each policy and budget"),
        ("pause-tokens", 8, "tokens of each stream between two arrivals"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{what} (default: {default})")
    add_kv_flags(parser, policies=("native", "default"), budgets=(0.3,))
    add_model_flags(parser)
    add_json_flag(parser)
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure, show and write.

    Returns:
        The exit status, 0.

    Raises:
        InvalidArgumentError: a flag is wrong.
        SpectrumKVError: a service does not start, or decode refuses the KV.
    """
    # Loading torch takes seconds, so --help does without.
    import torch

    from spectrumkv.bench.models.synthetic_prompt import SyntheticCache, synthetic_basis
    from spectrumkv.bench.serving import arrivals
    from spectrumkv.client.client import SpectrumClient
    from spectrumkv.client.local.pair_config import FREE_PORTS
    from spectrumkv.client.local.running_pair import running_pair, stopped_by_sigterm
    from spectrumkv.common.kv.geometry import KvGeometry
    from spectrumkv.common.rpc.channel import open_channel
    from spectrumkv.common.rpc.decode_methods import begin_basis
    from spectrumkv.common.service.config import build
    from spectrumkv.prefill_server.transfer.plan import KvPlan
    from spectrumkv.prefill_server.verdict import ProbeVerdict

    check_destinations(arguments)
    if min(arguments.streams, arguments.arrivals, arguments.pause_tokens) < 1:
        raise InvalidArgumentError("--streams, --arrivals and --pause-tokens must each be 1 or more")
    load_before = load_average()
    options = {**FREE_PORTS, "int4": "on", **given_options(arguments, "model", "device", "dtype")}
    config = build(PrefillConfig, {})
    choices = [choice.to_proto() for choice in kv_choices(arguments)]
    rows = []
    with stopped_by_sigterm(), running_pair(options) as pair:
        address = str(pair.decode.address)
        with SpectrumClient(address) as client:
            info: Any = client.server_info()
        spec = info.model
        geometry = KvGeometry(spec.layers, spec.kv_heads, spec.head_dim, getattr(torch, spec.dtype))
        short, long = (
            SyntheticCache.random(geometry, tokens, torch.device("cpu"))
            for tokens in (arguments.running_tokens, arguments.arriving_tokens)
        )
        basis = synthetic_basis(geometry)
        verdict = ProbeVerdict.from_flag("on", geometry.layers)
        plans = [KvPlan.resolve(choice, config, verdict, 0, basis) for choice in choices]
        lasting = (arguments.arrivals + 2) * (arguments.pause_tokens + TOKENS_PER_ARRIVAL)
        steps = len(plans) * arguments.arrivals
        with open_channel(address) as channel, progress(steps, Console(stderr=True)) as on_arrival:
            # Some plan may need the basis; a decode service keeps it.
            begin_basis(channel, basis, timeout=None)[0].result()
            for plan in plans:
                running, arriving = (
                    arrivals.record(spec, cache, plan, config.window, config.chunk_bytes, max_tokens)
                    for cache, max_tokens in ((short, lasting), (long, None))
                )
                measured = arrivals.measure(
                    channel,
                    running,
                    arriving,
                    arguments.streams,
                    arguments.arrivals,
                    arguments.pause_tokens,
                    on_arrival,
                )
                rows.append(_row(plan, arguments.arriving_tokens, arriving.byte_budget, measured))
    if arguments.json != STDOUT:
        results_console().print(arrivals_table(rows))
    if arguments.json is not None:
        write_speed_result(arguments.json, arguments, rows, describe_served_model(info), load_before)
    return 0


def _row(plan: Any, tokens: int, counted: float, measured: Mapping[str, Any]) -> dict[str, Any]:
    row = {
        "policy": plan.policy.name,
        "codec": plan.codec.name,
        "budget_target": plan.budget,
        "budget_counted": counted,
        "arriving_tokens": tokens,
        **measured,
    }
    for name in ("median", "p99"):
        row[f"{name}_itl_ratio"] = row[f"{name}_arrival_itl_ms"] / row[f"{name}_undisturbed_itl_ms"]
    return row


def arrivals_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of the rows."""
    table = plain_table(
        ("policy", "codec"),
        ("counted", "arrival ms", "ITL ms", "p99", "arriving: ITL", "p99", "p99 ÷ undisturbed"),
    )
    for row in rows:
        table.add_row(
            row["policy"],
            row["codec"],
            f"{row['budget_counted']:.4f}",
            f"{row['arrival_ms']:.0f}",
            f"{row['median_undisturbed_itl_ms']:.1f}",
            f"{row['p99_undisturbed_itl_ms']:.1f}",
            f"{row['median_arrival_itl_ms']:.1f}",
            f"{row['p99_arrival_itl_ms']:.1f}",
            f"{row['p99_itl_ratio']:.2f}",
        )
    table.caption = "gaps between tokens of running streams, between arrivals and during them"
    return table
