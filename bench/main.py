"""Run the `spectrumkv-bench` command. Each of its commands is a module whose `add_parser` registers it."""

import argparse
import sys
from collections.abc import Sequence

from spectrumkv.bench.codec import codec_command, coding_command
from spectrumkv.bench.device import device_check_command
from spectrumkv.bench.link import link_command
from spectrumkv.bench.models import commands as model_commands
from spectrumkv.bench.quality import niah_command, quality_command
from spectrumkv.bench.report import goals, plot
from spectrumkv.bench.serving import arrivals_command, serve_command, startup
from spectrumkv.bench.transfer import transfer_command
from spectrumkv.bench.vllm import niah_command as vllm_niah_command
from spectrumkv.bench.vllm import quality_command as vllm_quality_command
from spectrumkv.bench.vllm.link import command as vllm_link_command
from spectrumkv.client.cli.runner import command_parser, run_command, status_and_message

COMMANDS = (
    quality_command, niah_command, plot, goals, model_commands, codec_command, coding_command, transfer_command,
    serve_command, arrivals_command, startup, link_command, device_check_command,
    vllm_niah_command, vllm_quality_command, vllm_link_command,
)  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    description = "Measure SpectrumKV: quality, speed and bytes, each against baselines in the same run."
    return command_parser("spectrumkv-bench", description, COMMANDS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status of one command; see `run_command`."""
    return run_command(build_parser(), arguments, lambda error, _: status_and_message(error))


if __name__ == "__main__":
    sys.exit(main())
