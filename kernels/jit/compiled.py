"""The two decorators of compiled loops: numba's, without the GIL, with results kept in the cache directory."""

from collections.abc import Callable
from typing import Any

import numba
from numba import extending
from numba.core import config

from spectrumkv.kernels.jit.cache import compiled_code_directory

_directory = compiled_code_directory(config.CACHE_DIR)
# numba looks at this when a function is decorated.
config.CACHE_DIR = str(_directory or "")

# Declares a function whose instructions are emitted by hand; see `docs/compiled-loops.md`. numba ships no types.
intrinsic: Callable[..., Any] = extending.intrinsic


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function at its first call with each combination of types, or load what an earlier process compiled.

    Where nothing can be kept, each process compiles for some seconds; all else is the same. Arithmetic is IEEE's:
    nothing is reordered or fused except where emitted code says so. The function runs without the GIL.

    Args:
        function: takes numbers, tuples and numpy arrays, and uses nothing that numba does not know.

    Returns:
        A function with the same arguments.
    """
    decorate = numba.njit(cache=_directory is not None, nogil=True, error_model="numpy")
    decorated: Callable[..., Any] = decorate(function)
    return decorated
