"""`spectrumkv check`: does a running deployment use the KV that it sends, and how close is it to exact KV?"""

import argparse
import math
import sys
from typing import Any

from rich.console import Console

from spectrumkv.client.cli import connection_flags, generation_flags
from spectrumkv.client.cli.json_output import STDOUT, write_json
from spectrumkv.client.cli.output_file import check_writable
from spectrumkv.client.cli.self_check import CheckResult, self_check
from spectrumkv.client.cli.tables import facts_table

DEFAULT_TIMEOUT_SECONDS = 120.0
DEFAULT_MAX_KL = 0.5


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "check",
        help="send one request through a running deployment and compare with exact KV",
        description="Ask one question twice, with the KV sent as the server does by default and as the model "
        "computed it; compare tokens, predictions, bytes and recomputed tokens. Exit status 0: all is well.",
        allow_abbrev=False,
    )
    connection_flags.add_connection_flags(parser)
    parser.add_argument(
        "--timeout",
        type=generation_flags.parse_seconds,
        default=DEFAULT_TIMEOUT_SECONDS,
        metavar="S",
        help="seconds until a request is given up (default: %(default)g)",
    )
    parser.add_argument(
        "--max-kl",
        type=parse_divergence,
        default=DEFAULT_MAX_KL,
        metavar="NATS",
        help="mean divergence from the predictions over exact KV that is still well (default: %(default)g)",
    )
    parser.add_argument("--json", metavar="FILE", help="write it as JSON ('-': stdout, instead of the table)")
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Do it.

    Raises:
        SpectrumKVError: the result could not be written, or the server cannot be reached, is not ready, or refused a
            request.
    """
    check_writable("--json", arguments.json)
    with connection_flags.connect(arguments) as client:
        result = self_check(client, arguments.timeout, arguments.max_kl)
    if arguments.json != STDOUT:
        _show(Console(), result)
    if arguments.json is not None:
        write_json(_as_json(result), arguments.json)
    for problem in result.problems:
        sys.stderr.write(f"{problem}\n")
    return 1 if result.problems else 0


def parse_divergence(text: str) -> float:
    """Read a positive number of nats.

    Raises:
        argparse.ArgumentTypeError: it is not one.
    """
    try:
        nats = float(text)
    except ValueError:
        nats = 0.0
    if not 0.0 < nats < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: a positive number of nats")
    return nats


def _as_json(result: CheckResult) -> dict[str, Any]:
    usage = result.served.usage
    return {
        "server": result.server,
        "ok": not result.problems,
        "problems": result.problems,
        "policy": usage.policy,
        "codec": usage.codec,
        "decode_workers": sorted({usage.decode_worker, result.exact.usage.decode_worker}),
        "prompt_tokens": usage.prompt_tokens,
        "agreeing_tokens": result.agreeing_tokens,
        "compared_tokens": len(result.exact.tokens),
        "kl": result.kl,
        "budget_target": result.budget_target,
        "budget_counted": usage.byte_budget,
        "kv_bytes_sent": usage.kv_bytes_sent,
        "kv_fp16_bytes": usage.kv_fp16_bytes,
        "recomputed_prompt_tokens": usage.recomputed_prompt_tokens + result.exact.usage.recomputed_prompt_tokens,
        "text": result.served.text,
        "text_exact": result.exact.text,
    }


def _show(console: Console, result: CheckResult) -> None:
    usage = result.served.usage
    tokens = len(result.exact.tokens)
    console.print(
        facts_table(
            [
                ("server", result.server),
                ("policy, codec", f"{usage.policy}, {usage.codec}"),
                ("tokens before the answers part", f"{result.agreeing_tokens} of {tokens}"),
                ("divergence from exact KV", f"{result.kl:.5f} nats a token"),
                ("budget counted / default", f"{usage.byte_budget:.3f} / {result.budget_target:g}"),
                ("KV bytes sent / FP16", f"{usage.kv_bytes_sent:,} / {usage.kv_fp16_bytes:,}"),
                ("prompt tokens recomputed", str(usage.recomputed_prompt_tokens)),
                ("verdict", "something is off" if result.problems else "all is well"),
            ]
        )
    )
