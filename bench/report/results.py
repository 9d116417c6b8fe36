"""What every bench says of itself: versions, machine, model, arguments; and the one way to write results."""

import argparse
import os
import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from spectrumkv.client.cli.json_output import write_json
from spectrumkv.common.service.machine import memory_bytes

# Not at run time: the bench of kvpress runs on another transformers than loading does.
if TYPE_CHECKING:
    from spectrumkv.common.model.load import LoadedModel

PACKAGES = (
    "spectrumkv", "torch", "transformers", "triton", "numpy", "grpcio", "protobuf", "tokenizers", "optimum-quanto",
    "kvpress",
)  # fmt: skip
# What argparse keeps for itself.
NOT_ARGUMENTS = ("run", "parser")


def write_result(
    destination: str,
    arguments: argparse.Namespace,
    rows: Sequence[Mapping[str, Any]],
    model: Mapping[str, Any] | None,
) -> None:
    """Write `{"meta": …, "rows": […]}`.

    Args:
        destination: a path, or "-" for standard output.
        arguments: of the command.
        rows: the results.
        model: see `describe_model`; None where no model took part.

    Raises:
        InvalidArgumentError: the file cannot be written.
    """
    write_json({"meta": describe_run(arguments, model), "rows": [dict(one) for one in rows]}, destination)


def describe_run(arguments: argparse.Namespace, model: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the `meta` block. It names no host, and of paths only the last part."""
    return {
        "versions": versions(),
        "machine": machine(),
        "model": None if model is None else dict(model),
        "args": {name: _plain(value) for name, value in sorted(vars(arguments).items()) if name not in NOT_ARGUMENTS},
    }


def describe_model(loaded: "LoadedModel") -> dict[str, Any]:
    """What was measured on."""
    return {
        "name": Path(loaded.name).name if Path(loaded.name).is_absolute() else loaded.name,
        "architecture": loaded.spec.architecture,
        "weights_digest": loaded.spec.weights_digest,
        "dtype": loaded.spec.dtype,
        "device": str(loaded.device),
    }


def versions() -> dict[str, str]:
    """Python's and those of the installed packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """The machine's make, not its name."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": memory_bytes(),
        "gpus": gpus,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu_model() -> str:
    try:
        listed = re.search(
            r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE
        )
    except OSError:
        listed = None
    return listed[1] if listed else platform.processor() or platform.machine()


def _plain(value: Any) -> Any:
    """An argument as JSON can carry it."""
    if isinstance(value, Path):
        return value.name
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, str) and os.path.isabs(value):
        return Path(value).name
    return value
