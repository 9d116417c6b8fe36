"""Run the `spectrumkv` command. Each of its commands is a module whose `add_parser` registers it."""

import argparse
import sys
from collections.abc import Sequence

from spectrumkv.client.cli import basis as basis_command
from spectrumkv.client.cli import check as check_command
from spectrumkv.client.cli import demo as demo_command
from spectrumkv.client.cli import generate as generate_command
from spectrumkv.client.cli import info as info_command
from spectrumkv.client.cli import probe as probe_command
from spectrumkv.client.cli import up as up_command
from spectrumkv.client.cli import vllm_proxy as vllm_proxy_command
from spectrumkv.client.cli.runner import command_parser, run_command, status_and_message
from spectrumkv.common.errors import SpectrumKVError, UnreachableError

COMMANDS = (
    generate_command,
    info_command,
    check_command,
    probe_command,
    basis_command,
    up_command,
    demo_command,
    vllm_proxy_command,
)


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
