"""Compilation for CPUs: numba's, without the GIL, with its results kept in the project's cache directory."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba import extending
from numba.core import config

from spectrumkv.kernels.cache import cache_directory


def _sources() -> str:
    """A name for what this folder's files say: numba notices a change of the file that a function is in only."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


# numba looks at this when a function is decorated. Its own variable, NUMBA_CACHE_DIR, keeps precedence.
if not config.CACHE_DIR:
    config.CACHE_DIR = str(cache_directory() / "compiled" / _sources())

# numba ships no types.
intrinsic: Callable[..., Any] = extending.intrinsic


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile at the first call with each combination of types, or load what an earlier process compiled.

    Arithmetic is IEEE's, nothing is reordered or fused: results are bit for bit those of the same operations in
    torch.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        kept: Callable[..., Any] = numba.njit(cache=True, **options)(function)
    except RuntimeError:
        # No directory can be written to. Compiling takes seconds in each process; that is all.
        kept = numba.njit(**options)(function)
    return kept
