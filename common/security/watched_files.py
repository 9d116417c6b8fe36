"""Reads files again when they change, so that certificates, keys and tokens are replaced without a restart."""

import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.files import open_regular

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Certificates and tokens take kilobytes; anything larger is another file.
MAX_FILE_BYTES = 1 << 20

# For each file: the times at which its contents and its inode changed, its size, and its inode's number.
_Signature = tuple[tuple[int, int, int, int], ...]


class WatchedFiles(Generic[T]):
    """Holds what some files say, and reads them again when they change.

    Each access to `current` looks at the files' metadata, so that no thread has to watch them. If the files become
    unreadable, or do not fit together because a rotation is halfway through, an error is logged once and the last
    good contents stay in use.

    Args:
        paths: the files.
        read: reads the files; raises InvalidArgumentError if they cannot be used.

    Attributes:
        reload_failed: whether the files changed lately and cannot be used as they are.

    Raises:
        InvalidArgumentError: the files cannot be used now.
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[], T]) -> None:
        self._paths = tuple(paths)
        self._read = read
        self.reload_failed = False
        self._lock = threading.Lock()
        self._seen = self._signature()
        self._current = read()

    @property
    def current(self) -> T:
        """What the files say; the same object as long as the files do not change."""
        if self._signature() != self._seen:
            with self._lock:
                self._read_again()
        return self._current

    def _read_again(self) -> None:
        before = self._signature()
        if before == self._seen:
            return
        names = ", ".join(map(str, self._paths))
        try:
            latest = self._read()
        except InvalidArgumentError as error:
            self._seen = before
            self.reload_failed = True
            logger.error("%s changed and cannot be used; what was read before stays in use: %s", names, error.message)
            return
        # Files that were written while they were read may not belong together; the next access reads them again.
        if self._signature() == before:
            self._seen, self._current = before, latest
            self.reload_failed = False
            logger.info("read again: %s", names)

    def _signature(self) -> _Signature:
        return tuple(_signature(path) for path in self._paths)


def _signature(path: Path) -> tuple[int, int, int, int]:
    try:
        found = os.stat(path)
    except OSError:
        # Reading the file raises an error that says what is wrong.
        return (0, 0, 0, 0)
    return (found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino)


def read_file(option: str, path: Path) -> bytes:
    """Return a file's bytes.

    Args:
        option: the flag that named the file, for the error.
        path: the file.

    Raises:
        InvalidArgumentError: the file cannot be read, or is larger than 1 MiB.
    """
    try:
        with open_regular(path) as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InvalidArgumentError(
            f"{option} {path} cannot be read: {error.strerror}; name a file that this process may read"
        ) from error
    if len(data) > MAX_FILE_BYTES:
        raise InvalidArgumentError(f"{option} {path} is larger than {MAX_FILE_BYTES} bytes; is it the right file?")
    return data
