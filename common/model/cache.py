"""Where downloads and results of long computations are kept between runs."""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from spectrumkv.common.errors import FailedPreconditionError
from spectrumkv.kernels.jit.cache import CACHE_VARIABLE, cache_directory

__all__ = ["CACHE_VARIABLE", "build_once", "cache_directory"]

logger = logging.getLogger(__name__)


def build_once(directory: Path, build: Callable[[Path], None]) -> Path:
    """Return `directory`, built first where it does not exist.

    Of several processes that ask at the same time one builds and the others wait. `build` fills a directory
    beside the final one, which takes its name only when it is complete, so that a process that is killed
    leaves nothing that could be taken for a result.

    Args:
        directory: the result's final place.
        build: fills the empty directory that it is given.

    Raises:
        FailedPreconditionError: the place cannot be written to. Errors of `build` pass through.
    """
    if directory.is_dir():
        return directory
    lock = FileLock(directory.with_name(f"{directory.name}.lock"))
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        _acquire(lock, directory)
    except OSError as error:
        raise _unwritable(directory.parent, error) from error
    try:
        if not directory.is_dir():
            _build(directory, build)
    finally:
        lock.release()
    return directory


def _acquire(lock: FileLock, directory: Path) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("waiting for another process that is preparing %s", directory)
        lock.acquire()


def _build(directory: Path, build: Callable[[Path], None]) -> None:
    partial = directory.with_name(f"{directory.name}.partial")
    try:
        # The lock is ours, so whoever left this is dead.
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        build(partial)
        os.replace(partial, directory)
    except OSError as error:
        raise _unwritable(directory.parent, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _unwritable(directory: Path, error: OSError) -> FailedPreconditionError:
    return FailedPreconditionError(
        f"cannot write to {directory}: {error}; make room or name another cache directory in {CACHE_VARIABLE}"
    )
