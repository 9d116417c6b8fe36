"""`spectrumkv-bench key-bias-model`: a model whose keys have large biases, for `--model`."""

import argparse
import sys


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "key-bias-model",
        help="build the default model with large key biases, and print its directory for --model",
        description="Print the directory of a model that computes what the default model does, with key biases as "
        "large as Qwen2.5's, on which naive INT4 fails. It is built when it is first asked for (538 MB).",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Do it.

    Raises:
        SpectrumKVError: the model cannot be built.
    """
    # Loading torch and transformers takes seconds, which --help need not pay.
    from spectrumkv.bench.models.key_bias import key_bias_model_directory

    sys.stdout.write(f"{key_bias_model_directory()}\n")
    return 0
