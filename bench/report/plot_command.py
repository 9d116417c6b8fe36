"""`spectrumkv-bench plot`: several runs of `quality` in one plot."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spectrumkv.bench.flags.destinations import check_destinations
from spectrumkv.bench.quality.result import read_result
from spectrumkv.common.errors import InvalidArgumentError

# Of the arguments, what must be alike in runs that are compared.
SAME_ARGUMENTS = ("text_sha256", "context", "scored", "skip_windows", "windows")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "plot",
        help="draw several runs of quality, such as the services' and the peers', together",
        description="Draw the rows of several results of `quality` on the same model, text and windows.",
        allow_abbrev=False,
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="FILE", help="JSON that quality wrote")
    parser.add_argument("--plot", required=True, metavar="FILE", help="the plot (.png, .svg or .pdf)")
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Do it.

    Raises:
        SpectrumKVError: a result cannot be read, or the runs are not comparable.
    """
    from spectrumkv.bench.report import plots

    check_destinations(arguments)
    results = [read_result(path) for path in arguments.results]
    check_comparable(arguments.results, results)
    rows = [row for result in results for row in result["rows"]]
    plots.draw_quality(rows, arguments.plot, results[0]["meta"]["model"]["name"])
    return 0


def check_comparable(paths: list[Path], results: list[dict[str, Any]]) -> None:
    """Check that all runs read the same windows with the same model.

    Raises:
        InvalidArgumentError: they do not; the message says where they differ.
    """
    first = _circumstances(results[0])
    for path, result in zip(paths, results, strict=True):
        for name, value in _circumstances(result).items():
            if value != first[name]:
                raise InvalidArgumentError(
                    f"{path} has {name} {value!r} and {paths[0]} has {first[name]!r}; only runs on the same windows "
                    "of the same text with the same model can be compared"
                )


def _circumstances(result: Mapping[str, Any]) -> dict[str, Any]:
    meta = result["meta"]
    chosen = {name: meta["args"].get(name) for name in SAME_ARGUMENTS}
    return chosen | {name: meta["model"].get(name) for name in ("weights_digest", "dtype")}
