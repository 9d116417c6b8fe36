"""What the documents say to type exists: targets of make, commands, and their flags."""

import argparse
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest

from spectrumkv.client import health
from spectrumkv.client.cli.main import build_parser
from spectrumkv.common.service.command_line import CHECK_FLAG, add_flags
from spectrumkv.common.service.config import DecodeConfig, PrefillConfig
from spectrumkv.gateway.config import GatewayConfig
from tests.docs.documents import DOCUMENTS, ROOT, name_of

# Decisions and experiments speak of what there was at their time.
CURRENT = [path for path in DOCUMENTS if path.parent.name not in ("adr", "experiments")]
# A span of code in a sentence, which may go over a line, or a block.
CODE = re.compile(r"^[ \t]*```\w*\n(.*?)^[ \t]*```|`([^`]+)`", re.MULTILINE | re.DOTALL)
CONTINUED = re.compile(r"\s*\\?\n\s*")
TARGETS = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
MAKE = re.compile(r"(?:^|[|;&]\s*|\s-- )make ((?:[a-z][a-z-]*)(?: [a-z][a-z-]*)*)", re.MULTILINE)
# After "-n" it is a namespace of Kubernetes.
PROGRAM = re.compile(r"(?:^|(?<!-n)[\s/(])(spectrumkv(?:-[a-z]+)?)((?:[ \t]+[^\s|;&#`]+)*)", re.MULTILINE)
FLAG = re.compile(r"--[a-z][\w-]*")
SERVICES = {
    "spectrumkv-prefill": PrefillConfig,
    "spectrumkv-decode": DecodeConfig,
    "spectrumkv-gateway": GatewayConfig,
}


def code_of(document: Path) -> list[str]:
    """Return a document's pieces of code, a command and its continuation in one line."""
    found = []
    for block, span in CODE.findall(document.read_text()):
        found.append(re.sub(r"\\\n\s*", "", block) if block else CONTINUED.sub(" ", span))
    return found


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    """Return the flags of a parser and of the commands below it."""
    below = [action.choices.values() for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    flags = {flag for action in parser._actions for flag in action.option_strings}
    return flags.union(*(flags_of(one) for parsers in below for one in parsers))


def commands_of(parser: argparse.ArgumentParser) -> dict[str, set[str]]:
    """Return the flags of each command of a parser."""
    [commands] = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return {name: flags_of(one) for name, one in commands.choices.items()}


@cache
def programs() -> dict[str, dict[str, set[str]]]:
    """Return the flags by program and command; a program without commands has them under no name."""
    from spectrumkv.bench.main import build_parser as bench_parser

    found = {"spectrumkv": commands_of(build_parser()), "spectrumkv-bench": commands_of(bench_parser())}
    found["spectrumkv-health"] = {"": flags_of(health.build_parser())}
    for program, config in SERVICES.items():
        parser = argparse.ArgumentParser()
        add_flags(parser, config)
        found[program] = {"": flags_of(parser) | {"--config", CHECK_FLAG}}
    return found


def problem_of(program: str, words: list[str]) -> str | None:
    """Return what is wrong with a command, if anything is."""
    commands = programs().get(program)
    if commands is None:
        # Policies of benches and names of containers look alike, and have no flags.
        return f"there is no program {program}" if any(map(FLAG.match, words)) else None
    command = "" if "" in commands else next(iter(words), "COMMAND")
    if not re.fullmatch(r"[a-z-]*", command):
        # Only the program is named, or any of its commands.
        return None
    if command not in commands:
        return f"{program} has no command {command}"
    known = commands[command] | {"--help", "--version"}
    unknown = [flag for word in words for flag in FLAG.findall(word) if flag not in known]
    return f"{program} {command} has no flag {unknown[0]}" if unknown else None


def test_every_program_that_is_installed_is_known_here() -> None:
    assert programs().keys() == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"].keys()


@pytest.mark.parametrize("document", CURRENT, ids=name_of)
def test_every_target_of_make_that_is_named_exists(document: Path) -> None:
    named = {target for code in code_of(document) for line in MAKE.findall(code) for target in line.split()}
    assert named - TARGETS == set()


@pytest.mark.parametrize("document", CURRENT, ids=name_of)
def test_every_command_and_flag_that_is_named_exists(document: Path) -> None:
    found = [one for code in code_of(document) for one in PROGRAM.findall(code)]
    assert not [problem for program, words in found if (problem := problem_of(program, words.split()))]
