"""Defines the flags that name a pair of vLLM servers, and finds out what they run."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectrumkv.bench.flags import parse_budgets
from spectrumkv.bench.report.results import versions

if TYPE_CHECKING:
    from spectrumkv.bench.vllm.engine import EnginePair


def add_server_flags(parser: argparse.ArgumentParser, budgets: Sequence[float]) -> None:
    """Add `--prefill`, `--decode`, `--model` and `--budgets`.

    Args:
        parser: gets the flags.
        budgets: the default budgets.
    """
    group = parser.add_argument_group("servers")
    for role, port in (("prefill", 8100), ("decode", 8200)):
        group.add_argument(
            f"--{role}", default=f"http://127.0.0.1:{port}", metavar="URL", help=f"the {role} server (%(default)s)"
        )
    group.add_argument("--model", metavar="NAME", help="their model, whose tokenizer is used (the embedded one)")
    group.add_argument(
        "--budgets",
        type=parse_budgets,
        default=tuple(budgets),
        metavar="NUMBERS",
        help=f"budgets of policy spectral, separated by commas (default: {','.join(f'{one:g}' for one in budgets)})",
    )


def add_scores_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--scores`."""
    parser.add_argument(
        "--scores",
        type=Path,
        metavar="FILE",
        help="keep every outcome here as soon as it is known; a run that was cut goes on where it ended",
    )


def measured_versions(pair: "EnginePair") -> dict[str, Any]:
    """Return what outcomes depend on beside a command's own flags, as JSON can express it.

    Args:
        pair: the servers, whose names of the model and versions of vLLM are asked for.

    Raises:
        UnavailableError: a server does not answer.
    """
    from spectrumkv import vllm_plugin
    from spectrumkv.bench.quality.kept_scores import MEASURED_MODULES
    from spectrumkv.bench.report.kept_outcomes import modules_digest

    return {
        "model": [pair.prefill.model, pair.decode.model],
        "vllm": [pair.prefill.version, pair.decode.version],
        "versions": versions(),
        "sources": modules_digest((*MEASURED_MODULES, vllm_plugin)),
    }
