"""What takes long to compute is kept in the cache directory between runs: models, bases, verdicts, digests.

One rule holds for every kind of entry. An entry appears complete or not at all, even if its writer is killed. An
entry that its reader refuses is damaged: a warning names it, and it is computed again in its place. Readers hold an
entry against a checksum, since a number that has changed into another one shows in no other way.
"""

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from spectrumkv.common.errors import FailedPreconditionError, SpectrumKVError
from spectrumkv.common.files import check_regular, read_text
from spectrumkv.kernels.jit.cache import CACHE_VARIABLE, cache_directory

__all__ = [
    "CACHE_VARIABLE",
    "UnwritableCacheError",
    "build_once",
    "cache_directory",
    "read_entry",
    "sha256_of_json",
    "write_entry",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")


class UnwritableCacheError(FailedPreconditionError):
    """The cache directory cannot be read or written to; what was to be kept there can still be computed."""


# The errors that readers raise for a damaged entry.
_DAMAGE = (OSError, ValueError, SpectrumKVError)


def sha256_of_json(value: Any) -> str:
    """Return the SHA-256 of a value written as JSON, in hexadecimal: a name for what depends on that value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def build_once(directory: Path, name: str, build: Callable[[Path], None], read: Callable[[Path], T]) -> T:
    """Read an entry that is a directory, and build it first where it does not exist or is damaged.

    Of several processes that ask at the same time one builds and the others wait. `build` fills a directory
    beside the final one, which takes its name only when it is complete, so that a process that is killed
    leaves nothing that could be taken for a result.

    Args:
        directory: the entry's final place.
        name: what the entry is, for the log.
        build: fills the empty directory that it is given.
        read: returns what the entry holds; raises OSError, ValueError or SpectrumKVError where it is damaged.

    Returns:
        What `read` returns.

    Raises:
        UnwritableCacheError: the place cannot be read or written to. Errors of `build` pass through.
    """
    if _is_there(directory):
        try:
            return _read_regular(directory, read)
        except _DAMAGE:
            # Another process may have replaced it meanwhile: it is read again under the lock.
            pass
    with _locked(directory):
        if directory.is_dir():
            try:
                return _read_regular(directory, read)
            except _DAMAGE as error:
                logger.warning("cannot use %s kept in %s: %s; it is computed again", name, directory, error)
        _build(directory, build)
    return read(directory)


def _read_regular(directory: Path, read: Callable[[Path], T]) -> T:
    """Read an entry, unless one of its names stands for a pipe or a device, which would hold the reader for ever.

    Returns:
        What `read` returns.

    Raises:
        OSError: one of them does.
    """
    for file in directory.iterdir():
        check_regular(file)
    return read(directory)


def _is_there(directory: Path) -> bool:
    try:
        return directory.is_dir()
    except OSError as error:
        # A directory above it is another user's.
        raise _unwritable(directory.parent, error) from error


def read_entry(path: Path, name: str, parse: Callable[[str], T]) -> T | None:
    """Read an entry that is a text file, with the checksum of its text in front of it.

    Args:
        path: the entry's place.
        name: what the entry is, for the log.
        parse: turns the text into what it says; raises ValueError or SpectrumKVError where it is damaged.

    Returns:
        What `parse` returns; None where there is no entry, or a damaged one, which the caller computes again.
    """
    try:
        return parse(_without_checksum(read_text(path)))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except _DAMAGE as error:
        logger.warning("cannot use %s kept in %s: %s; it is computed again", name, path, error)
        return None


def write_entry(path: Path, name: str, text: str) -> None:
    """Write an entry that is a text file, in the place of an older one.

    A cache that cannot be written to costs a warning now, and time at the next start.

    Args:
        path: the entry's place.
        name: what the entry is, for the log.
        text: what it says.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # `tempfile` would keep the entry from all other users, and the umask says who may read it.
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
        try:
            partial.write_text(f"{_checksum(text)}\n{text}", encoding="utf-8")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("cannot keep %s in %s: %s; the next start computes it again", name, path, error)


def _without_checksum(entry: str) -> str:
    """Return what follows the first line of an entry.

    Raises:
        ValueError: the first line is not the checksum of the rest.
    """
    checksum, _, text = entry.partition("\n")
    if checksum != _checksum(text):
        raise ValueError("its first line is not the SHA-256 of the rest")
    return text


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    # In a container, users of group 0 take turns at one cache (docker/Dockerfile): each must be able to lock it.
    lock = FileLock(directory.with_name(f"{directory.name}.lock"), mode=0o664)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("waiting for another process that is preparing %s", directory)
            lock.acquire()
    except OSError as error:
        raise _unwritable(directory.parent, error) from error
    try:
        yield
    finally:
        lock.release()


def _build(directory: Path, build: Callable[[Path], None]) -> None:
    partial = directory.with_name(f"{directory.name}.partial")
    try:
        # This process has the lock, so the process that left this directory is dead.
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        build(partial)
        if directory.is_dir():
            shutil.rmtree(directory)
        os.replace(partial, directory)
    except OSError as error:
        raise _unwritable(directory.parent, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _unwritable(directory: Path, error: OSError) -> UnwritableCacheError:
    return UnwritableCacheError(
        f"cannot write to {directory}: {error}; make room or name another cache directory in {CACHE_VARIABLE}"
    )
