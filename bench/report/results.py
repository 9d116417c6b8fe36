"""Write result files: check at the start that they can be written, describe the run, and write its rows as JSON."""

import argparse
import os
import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectrumkv.bench.report.plot import check_plot
from spectrumkv.client.cli.output import check_writable, write_json
from spectrumkv.common.service.cgroup import memory_bytes

# Not imported at run time: the bench of kvpress runs on another transformers than loading a model does.
if TYPE_CHECKING:
    from spectrumkv.client.client import ServerInfo
    from spectrumkv.common.model.load import LoadedModel

PLOT_FLAGS = ("plot", "timeline")
PACKAGES = (
    "spectrumkv", "torch", "transformers", "triton", "numpy", "grpcio", "protobuf", "tokenizers", "optimum-quanto",
    "kvpress",
)  # fmt: skip
# Attributes of the arguments that are not flags.
NOT_ARGUMENTS = ("run", "parser")


def check_destinations(arguments: argparse.Namespace) -> None:
    """Refuse result files that could not be written, before hours are spent on them. No file is created or changed.

    Args:
        arguments: of any bench; those of `--json`, `--plot` and `--timeline` that it has are checked.

    Raises:
        InvalidArgumentError: a name is empty, a plot's format is unknown, a folder does not exist, or a file cannot
            be written.
        FailedPreconditionError: a plot is asked for and matplotlib is not installed.
    """
    check_writable("--json", getattr(arguments, "json", None))
    for name in PLOT_FLAGS:
        plot: str | None = getattr(arguments, name, None)
        if plot is not None:
            check_plot(f"--{name}", plot)


def write_result(
    destination: str,
    arguments: argparse.Namespace,
    rows: Sequence[Mapping[str, Any]],
    model: Mapping[str, Any] | None,
) -> None:
    """Write `{"meta": …, "rows": […]}`.

    Args:
        destination: a path, or "-" for standard output.
        arguments: the command's.
        rows: the results.
        model: see `describe_model`; None if no model took part.

    Raises:
        InvalidArgumentError: the file cannot be written.
    """
    _write(destination, describe_run(arguments, model), rows)


def write_speed_result(
    destination: str,
    arguments: argparse.Namespace,
    rows: Sequence[Mapping[str, Any]],
    model: Mapping[str, Any] | None,
    load_before: float | None,
) -> None:
    """Write `{"meta": …, "rows": […]}`; `meta` also has what influences the speed of the machine.

    Args:
        destination: a path, or "-" for standard output.
        arguments: the command's.
        rows: the results.
        model: see `describe_model`; None if no model took part.
        load_before: the load average before the run; see `load_average`.

    Raises:
        InvalidArgumentError: the file cannot be written.
    """
    _write(destination, describe_speed_run(arguments, model, load_before), rows)


def describe_speed_run(
    arguments: argparse.Namespace, model: Mapping[str, Any] | None, load_before: float | None
) -> dict[str, Any]:
    """Return the `meta` object of a bench of speed; see `write_speed_result`."""
    return describe_run(arguments, model) | {
        "load_average_before": load_before,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "niceness": os.nice(0),
    }


def load_average() -> float | None:
    """Return the load average of the last minute; None if the system does not report it."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def describe_run(arguments: argparse.Namespace, model: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the `meta` object. It names no host, and of each path only the last part."""
    return {
        "versions": versions(),
        "machine": machine(),
        "model": None if model is None else dict(model),
        "args": {name: _plain(value) for name, value in sorted(vars(arguments).items()) if name not in NOT_ARGUMENTS},
    }


def describe_model(loaded: "LoadedModel") -> dict[str, Any]:
    """Return the `meta.model` object of a model in this process."""
    return {
        "name": Path(loaded.name).name if Path(loaded.name).is_absolute() else loaded.name,
        "architecture": loaded.spec.architecture,
        "weights_digest": loaded.spec.weights_digest,
        "dtype": loaded.spec.dtype,
        "device": str(loaded.device),
    }


def describe_served_model(info: "ServerInfo") -> dict[str, Any]:
    """Return the `meta.model` object of a model that a service serves."""
    return {
        "name": info.model_name,
        "architecture": info.model.architecture,
        "weights_digest": info.model.weights_digest,
        "dtype": info.model.dtype,
        "device": info.device,
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Return the processor, cores, memory and GPUs of the machine, but not its name."""
    # Loading torch takes seconds, so commands that only print help do without.
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": memory_bytes(),
        "gpus": gpus,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _write(destination: str, meta: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    write_json({"meta": dict(meta), "rows": [dict(one) for one in rows]}, destination)


def _cpu_model() -> str:
    try:
        listed = re.search(
            r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE
        )
    except OSError:
        listed = None
    return listed[1] if listed else platform.processor() or platform.machine()


def _plain(value: Any) -> Any:
    """Return an argument as JSON can express it."""
    if isinstance(value, Path):
        return value.name
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, str) and os.path.isabs(value):
        return Path(value).name
    return value
