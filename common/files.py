"""Opens files that options and directories name, and nothing else that may have such a name.

A named pipe that nobody writes to would hold up the start of a service for ever, and a device may have no end.
"""

import errno
import io
import os
import stat
from pathlib import Path
from typing import BinaryIO

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


def read_text(path: Path) -> str:
    """Return the text of a regular file in UTF-8.

    Args:
        path: of the file, or of a symbolic link to it.

    Raises:
        OSError: the file cannot be read, or is none; `strerror` says why.
        UnicodeDecodeError: the file is not UTF-8.
    """
    with open_regular(path) as file, io.TextIOWrapper(file, encoding="utf-8") as text:
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
