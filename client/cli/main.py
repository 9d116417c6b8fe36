"""Run the `spectrumkv` command. Each of its commands is a module whose `add_parser` registers it."""

import argparse
import sys
from collections.abc import Sequence

from spectrumkv.client.cli.commands import basis, check, demo, generate, info, probe, up, vllm_proxy
from spectrumkv.client.cli.runner import command_parser, run_command, status_and_message
from spectrumkv.common.errors import SpectrumKVError, UnreachableError

COMMANDS = (generate, info, check, probe, basis, up, demo, vllm_proxy)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    description = "LLM inference in two places: the KV cache crosses the network on a precision spectrum."
    return command_parser("spectrumkv", description, COMMANDS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status of one command; see `run_command`."""
    return run_command(build_parser(), arguments, _sentence)


def _sentence(error: SpectrumKVError, parsed: argparse.Namespace) -> str:
    server = getattr(parsed, "server", None)
    hint = ""
    if isinstance(error, UnreachableError) and server is not None:
        hint = f" (asked {server}; `spectrumkv up` starts a server here, --server HOST:PORT names another)"
    return f"{status_and_message(error)}{hint}"


if __name__ == "__main__":
    sys.exit(main())
