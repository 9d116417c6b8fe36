"""Run `spectrumkv basis`: give all prefill services of a model the same codec basis, found once."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from spectrumkv.client.cli.output import check_writable
from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.files import check_regular, read_bytes
from spectrumkv.common.service.config import ServerConfig

if TYPE_CHECKING:
    from spectrumkv.common.kv.codecs.basis import Basis
    from spectrumkv.common.model.load import LoadedModel

T = TypeVar("T")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "basis",
        help="write a model's codec basis to a file, or take it from one",
        description="Calibration finds other bytes on other machines, so each kind of prefill host sends decode "
        "its own basis. Export the basis on one host, and import the file on the others before their prefill service "
        "starts.",
        allow_abbrev=False,
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    for name, text, run in (
        ("export", "write this machine's basis to FILE; it is found first where there is none", _export),
        ("import", "keep the basis in FILE for this machine's prefill service, in the place of its own", _import),
    ):
        action = actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
        action.add_argument("file", metavar="FILE", help="a file of safetensors")
        action.add_argument(
            "--model", metavar="NAME", help="local directory or hub name (default: the embedded model)"
        )
        for flag, choices in (("device", "auto, cpu, cuda"), ("dtype", "auto, float32, float16, bfloat16")):
            default = getattr(ServerConfig, flag)
            action.add_argument(
                f"--{flag}",
                default=default,
                metavar="NAME",
                help=f"as the prefill service has it, one of {choices} (default: {default})",
            )
        action.set_defaults(run=run, parser=action)


def _export(arguments: argparse.Namespace) -> int:
    """Write the model's basis.

    Returns:
        The exit status, 0.

    Raises:
        InvalidArgumentError: the file cannot be written.
        SpectrumKVError: the model cannot be loaded or calibrated.
    """
    check_writable("FILE", arguments.file)
    loaded = _load(arguments)
    basis = _resolve(loaded)
    try:
        Path(arguments.file).write_bytes(basis.serialized)
    except OSError as error:
        raise InvalidArgumentError(
            f"FILE {arguments.file}: {error.strerror}; name a file that can be written"
        ) from error
    _say(f"wrote basis {basis.digest.hex()} of {loaded.name}, {len(basis.serialized)} bytes, to {arguments.file}")
    return 0


def _import(arguments: argparse.Namespace) -> int:
    """Keep a basis for the model.

    Returns:
        The exit status, 0.

    Raises:
        InvalidArgumentError: the file cannot be read, or holds no basis for this model.
        SpectrumKVError: the model cannot be loaded, or the basis cannot be kept.
    """
    from spectrumkv.common.kv.codecs.base import largest_basis_bytes, parse_basis
    from spectrumkv.prefill_server.tuning.basis_cache import keep_basis

    file = Path(arguments.file)
    # Before the model is loaded, which takes a while.
    _readable(lambda: check_regular(file), file)
    loaded = _load(arguments)
    basis = parse_basis(
        _readable(lambda: read_bytes(file, largest_basis_bytes(loaded.geometry)), file), loaded.geometry
    )
    directory = keep_basis(loaded, basis)
    _say(f"kept basis {basis.digest.hex()} of {loaded.name} in {directory}; prefill uses it from its next start on")
    return 0


def _readable(read: Callable[[], T], file: Path) -> T:
    """Return what `read` returns.

    Raises:
        InvalidArgumentError: the file cannot be read.
    """
    try:
        return read()
    except OSError as error:
        raise InvalidArgumentError(f"FILE {file} cannot be read: {error.strerror}") from error


def _load(arguments: argparse.Namespace) -> "LoadedModel":
    # Loading torch and transformers takes seconds, so the other commands do without.
    from spectrumkv.common.model.load import load_model

    return load_model(arguments.model, arguments.device, arguments.dtype)


def _resolve(loaded: "LoadedModel") -> "Basis":
    from spectrumkv.prefill_server.tuning.basis_cache import EXCERPTS, resolve_basis

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"calibrating {loaded.name}", total=EXCERPTS)
        return resolve_basis(loaded, lambda done: progress.update(task, completed=done))


def _say(sentence: str) -> None:
    Console(highlight=False, soft_wrap=True).print(sentence, markup=False)
