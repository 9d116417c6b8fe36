"""Run a command line: let commands register themselves, print errors as sentences, choose the exit status."""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from importlib.metadata import version
from typing import Any, Protocol

from rich.console import Console

from spectrumkv.client.cli.output import OutputError, named_output, show_any_character
from spectrumkv.common.errors import SpectrumKVError
from spectrumkv.common.telemetry.log_output import lead_nowhere, prepare_standard_streams

EXIT_ERROR = 1
# Shells report this status for a program that SIGINT ended.
EXIT_INTERRUPTED = 130


class Command(Protocol):
    """Describe a module with a command; its parser sets `run`, which takes the arguments and returns the status."""

    def add_parser(self, subparsers: Any) -> None:
        """Add the command to the parser."""
        ...


def command_parser(program: str, description: str, commands: Iterable[Command]) -> argparse.ArgumentParser:
    """Return the parser of a command line with these commands."""
    parser = argparse.ArgumentParser(prog=program, description=description, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"{program} {version('spectrumkv')}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in commands:
        command.add_parser(subparsers)
    return parser


def run_command(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    sentence: Callable[[SpectrumKVError, argparse.Namespace], str],
) -> int:
    """Run one command and return the exit status: 0, 1 for an error, 2 for wrong usage, 130 for Ctrl-C.

    Args:
        parser: from `command_parser`.
        arguments: the words of the command line; None takes those of the process.
        sentence: returns the line that is written to stderr about an error.

    Returns:
        The exit status.
    """
    prepare_standard_streams()
    show_any_character()
    parsed = parser.parse_args(arguments)
    try:
        with named_output():
            return int(parsed.run(parsed))
    except SpectrumKVError as error:
        _complain(sentence(error, parsed))
        return EXIT_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has closed the pipe.
        _drop_output()
        return EXIT_ERROR
    except OutputError as error:
        _drop_output()
        _complain(f"standard output cannot be written: {error.strerror}; send it elsewhere or make room")
        return EXIT_ERROR


def _complain(line: str) -> None:
    # Nobody is left to tell where standard error cannot be written either.
    with suppress(OSError):
        Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(line)


def _drop_output() -> None:
    """Redirect standard output to the null device, so that the flush at exit does not fail once more."""
    if sys.stdout is not None:
        lead_nowhere(sys.stdout.fileno())


def status_and_message(error: SpectrumKVError) -> str:
    """Return the status and the message of an error as a line of text."""
    return f"{error.code}: {error.message}"
