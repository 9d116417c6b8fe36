"""`spectrumkv-bench shaped-model`: random weights in a well-known shape, for `--model`."""

import argparse
from pathlib import Path


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "shaped-model",
        help="write a model of a well-known shape with random weights, for --model",
        description="Write a model of a well-known shape with random weights, in bfloat16 (mistral-7b: 15 GB). It "
        "says nothing of quality; it takes as long as the real one and has a KV cache as large.",
        allow_abbrev=False,
    )
    parser.add_argument("--shape", default="mistral-7b", metavar="NAME", help="the shape (default: %(default)s)")
    parser.add_argument("directory", type=Path, metavar="DIRECTORY", help="where to; it must not exist")
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Do it.

    Raises:
        InvalidArgumentError: there is no such shape, or the directory exists.
    """
    # Loading torch and transformers takes seconds, which --help need not pay.
    from spectrumkv.bench.models.shaped_model import write_shaped_model

    write_shaped_model(arguments.shape, arguments.directory)
    return 0
