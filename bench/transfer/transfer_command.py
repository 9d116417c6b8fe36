"""Run `spectrumkv-bench transfer`: send a KV cache from process to process, against its FP16 bytes over plain TCP."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from spectrumkv.bench.flags import add_geometry_flags, add_json_flag, add_kv_flags, geometry_from, kv_choices
from spectrumkv.bench.report.console import plain_table, progress, results_console
from spectrumkv.bench.report.results import check_destinations, load_average, write_speed_result
from spectrumkv.client.cli.output import STDOUT
from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.service.config import PrefillConfig

if TYPE_CHECKING:
    from spectrumkv.common.security import TlsFiles


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "transfer",
        help="speed of a transfer from process to process, against raw TCP",
        description="Send a synthetic prompt's KV over loopback into the slots of another process: its FP16 bytes "
        "over plain TCP and over gRPC, and through the product's own pipeline and receiver; report medians.",
        allow_abbrev=False,
    )
    add_geometry_flags(parser)
    group = parser.add_argument_group("the sender")
    group.add_argument("--query-heads", type=int, default=9, metavar="N", help="query heads (default: %(default)s)")
    group.add_argument(
        "--window",
        type=int,
        default=PrefillConfig.window,
        metavar="N",
        help="queries that scorers observe (default: %(default)s)",
    )
    group.add_argument(
        "--chunk-bytes",
        type=int,
        default=PrefillConfig.chunk_bytes,
        metavar="N",
        help="payload of a message (default: %(default)s)",
    )
    tls = parser.add_argument_group("mutual TLS, measured beside plaintext where all three are given")
    for name, what in (("cert", "a certificate for 127.0.0.1"), ("key", "its key"), ("ca", "its authority")):
        tls.add_argument(f"--tls-{name}", type=Path, metavar="FILE", help=f"PEM file of {what}")
    add_kv_flags(parser, policies=("fp16", "adaptive", "default"), budgets=(0.5, 0.3))
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="rounds that count (default: %(default)s)")
    add_json_flag(parser)
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure, show and write.

    Returns:
        The exit status, 0.

    Raises:
        SpectrumKVError: the geometry or a policy cannot be used.
    """
    # Loading torch takes seconds, so --help does without.
    import torch

    from spectrumkv.bench.models.synthetic_prompt import SyntheticCache, layer_captures, synthetic_basis
    from spectrumkv.bench.transfer import measure as transfer
    from spectrumkv.common.service.config import build
    from spectrumkv.prefill_server.transfer.plan import KvPlan
    from spectrumkv.prefill_server.verdict import ProbeVerdict

    check_destinations(arguments)
    tls = _tls_files(arguments)
    load_before = load_average()
    cache = SyntheticCache.random(geometry_from(arguments), arguments.tokens, torch.device("cpu"))
    config = build(PrefillConfig, {"chunk_bytes": arguments.chunk_bytes, "window": arguments.window})
    basis = synthetic_basis(cache.geometry)
    verdict = ProbeVerdict.from_flag("on", cache.geometry.layers)
    plans = [KvPlan.resolve(choice.to_proto(), config, verdict, 0, basis) for choice in kv_choices(arguments)]
    layers = layer_captures(cache, arguments.query_heads, config.window)
    with progress(arguments.rounds + 1, Console(stderr=True)) as on_round:
        rows = transfer.measure(cache, layers, plans, config.chunk_bytes, arguments.rounds, on_round, tls)
    if arguments.json != STDOUT:
        results_console().print(transfer_table(rows))
    if arguments.json is not None:
        write_speed_result(arguments.json, arguments, rows, None, load_before)
    return 0


def _tls_files(arguments: argparse.Namespace) -> "TlsFiles | None":
    """Return the TLS files of both ends; None if none is given.

    Raises:
        InvalidArgumentError: only some of the files are given.
    """
    from spectrumkv.common.security import TlsFiles

    files = (arguments.tls_cert, arguments.tls_key, arguments.tls_ca)
    if not any(files):
        return None
    if not all(files):
        raise InvalidArgumentError("mutual TLS needs all three of --tls-cert, --tls-key and --tls-ca")
    return TlsFiles(*files)


def transfer_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of the rows."""
    table = plain_table(
        ("path", "policy", "codec"),
        ("target", "counted", "FP16-eq. GB/s", "÷ raw TCP", "÷ plaintext", "seconds", "of that encoding"),
    )
    for row in rows:
        encoding, of_plaintext = row["score_and_encode_seconds"], row["ratio_to_plaintext"]
        table.add_row(
            Text(row["path"]),
            Text(row["policy"] or ""),
            Text(row["codec"] or ""),
            "" if row["budget_target"] is None else f"{row['budget_target']:g}",
            f"{row['budget_counted']:.4f}",
            f"{row['fp16_equivalent_gbps']:.3f}",
            f"{row['ratio_to_raw_tcp']:.3f}",
            "" if of_plaintext is None else f"{of_plaintext:.3f}",
            f"{row['seconds']:.4f}",
            "" if encoding is None else f"{encoding:.4f}",
        )
    table.caption = "GB of KV at 16 bits an element; encoding includes scores and tiers"
    return table
