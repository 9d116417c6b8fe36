"""The two decorators of compiled loops: numba's, without the GIL, with results kept in the cache directory."""

import hashlib
import logging
import os
import pickle
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numba
from numba import extending
from numba.core import config
from numba.core.caching import FunctionCache, IndexDataCacheFile

from spectrumkv.kernels.jit.cache import compiled_code_directory

logger = logging.getLogger(__name__)

# Code of one function takes up to a few hundred kilobytes.
MOST_FILE_BYTES = 64 << 20

_directory = compiled_code_directory(config.CACHE_DIR)
# numba looks at this when a function is decorated.
config.CACHE_DIR = str(_directory or "")

# Declares a function whose instructions are emitted by hand; see `docs/compiled-loops.md`. numba ships no types.
intrinsic: Callable[..., Any] = extending.intrinsic


class _CheckedFiles(IndexDataCacheFile):  # type: ignore[misc]
    """The files of a function's code, each after its SHA-256: code that was damaged would end the process.

    Each also says what it is code for. Of two processes that begin a function's list at once the later one's list
    stays, and it may name the file of the earlier one's code, which is for arguments of other types: bfloat16 in
    place of float16, for instance, whose numbers would be wrong.
    """

    def save(self, key: Any, data: Any) -> None:
        super().save(key, (key, data))

    def load(self, key: Any) -> Any:
        found = super().load(key)
        return None if found is None or found[0] != key else found[1]

    def _load_index(self) -> Any:
        with suppress(FileNotFoundError):
            _check_file(self._index_path)
        return super()._load_index()

    def _save_data(self, name: str, data: Any) -> None:
        code = self._dump(data)
        super()._save_data(name, (hashlib.sha256(code).digest(), code))

    def _load_data(self, name: str) -> Any:
        _check_file(self._data_path(name))
        digest, code = super()._load_data(name)
        if hashlib.sha256(code).digest() != digest:
            raise ValueError(f"{self._data_path(name)} is damaged")
        return pickle.loads(code)  # noqa: S301  # this user's own cache, as numba reads it


class _KeptCode(FunctionCache):  # type: ignore[misc]
    """Keeps compiled code as numba does, and goes on without where a file is damaged or cannot be written.

    numba lets the errors of a file through: one that was cut short by a full disk or a power failure would end every
    later start.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._cache_file = _CheckedFiles(
            cache_path=self._cache_path,
            filename_base=self._impl.filename_base,
            source_stamp=self._impl.locator.get_source_stamp(),
        )

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return the code kept for a signature; None where there is none that can be used."""
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # noqa: BLE001  # reading a damaged pickle raises anything
            logger.warning("compiled code kept in %s cannot be used: %s; compiling anew", self._cache_path, error)
            self._forget()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep the code of a signature, if that is possible."""
        try:
            super().save_overload(sig, data)
        except Exception as error:  # noqa: BLE001  # the index is read again before it is written
            logger.warning("cannot keep code in %s: %s; the next start compiles again", self._cache_path, error)

    def _forget(self) -> None:
        """Remove the list of what is kept for this function, so that it is written anew."""
        try:
            Path(self._cache_file._index_path).unlink(missing_ok=True)
        except OSError as error:
            logger.warning("cannot remove damaged code in %s: %s", self._cache_path, error)


def _check_file(path: str) -> None:
    """Check that a file may be read whole: a pipe would hold up the reader for ever, and a vast file fill its memory.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it may not.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_FILE_BYTES:
        raise ValueError(f"{path} is no file that was written here")


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function at its first call with each combination of types, or load what an earlier process compiled.

    Where nothing can be kept, each process compiles for some seconds; all else is the same. Arithmetic is IEEE's:
    nothing is reordered or fused except where emitted code says so. The function runs without the GIL.

    Args:
        function: takes numbers, tuples and numpy arrays, and uses nothing that numba does not know.

    Returns:
        A function with the same arguments.
    """
    decorated: Any = numba.njit(nogil=True, error_model="numpy")(function)
    if _directory is not None:
        # What `njit(cache=True)` does, with numba's own class.
        decorated._cache = _KeptCode(function)
    made: Callable[..., Any] = decorated
    return made
