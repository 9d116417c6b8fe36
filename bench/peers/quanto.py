"""quanto's compiled kernels: said where they are to be compiled first, refused where torch would wait without end.

quanto has torch compile an extension when it first unpacks a tensor. torch makes a file named `lock` in the folder of
the build while it compiles or loads, built or not, and waits for as long as one lies there. A process that is killed
meanwhile leaves its own, for which every later one would wait, silently.
"""

import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from spectrumkv.common.errors import FailedPreconditionError

QUANTO = "optimum.quanto"
"""The module that is there where quanto is installed."""

# By the kind of device; a GPU has the one that torch was built for. Without any of them quanto compiles nothing.
EXTENSIONS = {"cpu": ("quanto_cpp",), "cuda": ("quanto_cuda", "quanto_hip")}
# Loading what is built takes a fraction of a second, for which another process may hold the lock.
LOADING_SECONDS = 5.0
LOOK_SECONDS = 0.05


def expect_extension(device: torch.device, console: Console) -> None:
    """Look at quanto's extension before something uses it.

    Args:
        device: that tensors are unpacked on.
        console: is told where kernels are to be compiled first.

    Raises:
        FailedPreconditionError: torch would wait for another process, which may not run any more.
    """
    extension = _extension(device)
    if extension is None:
        return
    folder = Path(extension.build_directory)
    built_with = _built_with(folder)
    built = built_with == torch.__version__
    # quanto removes what was built with another torch, and the lock with it.
    if built or built_with is None:
        _check_lock(folder / "lock", LOADING_SECONDS if built else 0.0)
    if not built:
        console.print("quanto compiles its kernels at first use, which takes a minute", markup=False, style="dim")


def _extension(device: torch.device) -> Any:
    """How quanto describes the extension; None where it has none for such a device."""
    from optimum.quanto.library.extensions import get_extension, is_extension_available

    names = [name for name in EXTENSIONS[device.type] if is_extension_available(name)]
    return get_extension(names[0]) if names else None


def _built_with(folder: Path) -> str | None:
    """The torch that the extension was built with; None where it is not built. quanto notes it when it is loaded."""
    try:
        return (folder / "pytorch_version.txt").read_text(encoding="utf-8").rstrip()
    except FileNotFoundError:
        return None


def _check_lock(lock: Path, patience: float) -> None:
    deadline = time.monotonic() + patience
    while lock.exists():
        if time.monotonic() >= deadline:
            raise FailedPreconditionError(
                f"{lock} is there: another process is compiling quanto's kernels now, or one was ended meanwhile; "
                "wait for that process, or delete the file if no other one runs"
            )
        time.sleep(LOOK_SECONDS)
