"""Compilation for CPUs: numba's, without the GIL, with its results kept in the project's cache directory."""

import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numba
from numba import extending
from numba.core import config

from spectrumkv.kernels.jit.cache import cache_directory

# What no process has used for so long is of another release.
KEPT_SECONDS = 30 * 86400.0
_DIGEST = re.compile("[0-9a-f]{16}")


def _sources() -> str:
    """A name for what the files of all kernels say."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _directory_of_these_sources() -> Path | None:
    """Make the directory where code compiled from these files is kept; None where it cannot be written to.

    numba notices a change of the file that a function is in, and none of the files that it calls functions of.
    """
    every = Path(config.CACHE_DIR) if config.CACHE_DIR else cache_directory() / "compiled"
    kept = every / _sources()
    try:
        kept.mkdir(parents=True, exist_ok=True)
        os.utime(kept)
    except OSError:
        return None
    if not os.access(kept, os.W_OK):
        return None
    for other in every.iterdir():
        # Another process may be quicker.
        with suppress(FileNotFoundError):
            if _DIGEST.fullmatch(other.name) and time.time() - other.stat().st_mtime > KEPT_SECONDS:
                shutil.rmtree(other, ignore_errors=True)
    return kept


_kept_in = _directory_of_these_sources()
# numba looks at this when a function is decorated.
config.CACHE_DIR = str(_kept_in or "")

# numba ships no types.
intrinsic: Callable[..., Any] = extending.intrinsic


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile at the first call with each combination of types, or load what an earlier process compiled.

    Where nothing can be kept, compiling takes seconds in each process; that is all. Arithmetic is IEEE's, and nothing
    is reordered or fused but where emitted code says so.
    """
    kept: Callable[..., Any] = numba.njit(cache=_kept_in is not None, nogil=True, error_model="numpy")(function)
    return kept
