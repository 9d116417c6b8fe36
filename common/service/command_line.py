"""Reads a service's options from its command line and the TOML file that `--config` names."""

import argparse
import tomllib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.files import read_text
from spectrumkv.common.service.config import build
from spectrumkv.common.service.options import allowed_by, flag_name, text_of

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# No option: it says what the process does with the others.
CHECK_FLAG = "--check-config"

C = TypeVar("C", bound="DataclassInstance")


def add_flags(parser: argparse.ArgumentParser, config_class: "type[DataclassInstance]") -> None:
    """Add a flag for every option; a flag that is not given leaves no attribute in the namespace."""
    for declared in fields(config_class):
        name, default, text = flag_name(declared.name), declared.default, str(declared.metadata["help"])
        if isinstance(default, bool):
            text += f" (default: {'yes' if default else 'no'})"
            parser.add_argument(name, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
            continue
        notes = [allowed_by(declared.metadata["parse"])]
        notes += [] if default is None else [f"default: {declared.metadata['shown'] or text_of(default)}"]
        if suffix := "; ".join(filter(None, notes)):
            text = f"{text} ({suffix})"
        parser.add_argument(name, default=argparse.SUPPRESS, metavar="VALUE", help=text.replace("%", "%%"))


class _FlagParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InvalidArgumentError(f"{message}; {self.prog} --help lists the options")


def asks_for_check(arguments: Sequence[str]) -> bool:
    """Return whether a service's command line asks only what would be served.

    Args:
        arguments: the command line without the program's name.
    """
    return CHECK_FLAG in arguments


def load(config_class: type[C], arguments: Sequence[str], program: str) -> C:
    """Read the options of a service from its command line and the file that --config names.

    Args:
        config_class: `PrefillConfig`, `DecodeConfig` or the gateway's.
        arguments: the command line without the program's name.
        program: the program's name, for --help and errors.

    Returns:
        The options.

    Raises:
        InvalidArgumentError: a key is unknown, a value is not allowed, or the file cannot be read.
    """
    parser = _FlagParser(prog=program, description=config_class.__doc__, allow_abbrev=False)
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with these options as keys")
    parser.add_argument(CHECK_FLAG, action="store_true", help="say what would be served, and serve nothing")
    add_flags(parser, config_class)
    given = vars(parser.parse_args(arguments))
    path: Path | None = given.pop("config")
    del given["check_config"]
    return build(config_class, (_read_file(path) if path else {}) | given)


def _read_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_text(path))
    except OSError as error:
        raise InvalidArgumentError(f"--config {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        # A number of thousands of digits is a plain ValueError.
        raise InvalidArgumentError(f"--config {path} is not a TOML file: {error}") from error
