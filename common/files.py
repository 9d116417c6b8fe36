"""Opens files that options and directories name, and nothing else that may have such a name.

A named pipe that nobody writes to would hold up the start of a service for ever, and a device may have no end.
"""

import errno
import io
import os
import stat
from pathlib import Path
from typing import BinaryIO

# More than any text that a service reads: descriptions of models, lists of shards, options, entries of the cache.
MOST_TEXT_BYTES = 64 << 20

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading.

    Args:
        path: of the file, or of a symbolic link to it, as Kubernetes mounts its secrets.

    Returns:
        The file, which the caller closes.

    Raises:
        OSError: the file cannot be opened, or is none; `strerror` says why.
    """
    # Without O_NONBLOCK a pipe would be waited for here.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check_kind(path, os.fstat(descriptor).st_mode)
    except OSError:
        os.close(descriptor)
        raise
    return open(descriptor, "rb")


def read_bytes(path: Path, most_bytes: int) -> bytes:
    """Return what a regular file has, unless that is more than it should be.

    Args:
        path: of the file, or of a symbolic link to it.
        most_bytes: that the file may have; a vast file is not read, since it would fill the memory.

    Raises:
        OSError: the file cannot be read, is none, or is larger; `strerror` says why.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        # It may grow while it is read, and files of /proc have no size.
        content = b"" if size > most_bytes else file.read(most_bytes + 1)
        if max(size, len(content)) > most_bytes:
            raise OSError(errno.EFBIG, f"it has {max(size, len(content))} bytes, more than {most_bytes}", str(path))
        return content


def read_text(path: Path, most_bytes: int = MOST_TEXT_BYTES) -> str:
    """Return the text of a regular file in UTF-8, its lines ended by line feeds.

    Args:
        path: of the file, or of a symbolic link to it.
        most_bytes: that the file may have.

    Raises:
        OSError: the file cannot be read, is none, or is larger; `strerror` says why.
        UnicodeDecodeError: the file is not UTF-8.
    """
    with io.TextIOWrapper(io.BytesIO(read_bytes(path, most_bytes)), encoding="utf-8") as text:
        return text.read()


def check_regular(path: Path) -> None:
    """Check that what others will open is a regular file or a directory.

    Args:
        path: of the file, or of a symbolic link to it.

    Raises:
        OSError: it is something else, or is not there; `strerror` says what.
    """
    mode = path.stat().st_mode
    if not stat.S_ISDIR(mode):
        _check_kind(path, mode)


def _check_kind(path: Path, mode: int) -> None:
    if stat.S_ISREG(mode):
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    kind = _KINDS.get(stat.S_IFMT(mode), "something else")
    raise OSError(errno.EINVAL, f"it is {kind}, and not a regular file", str(path))
