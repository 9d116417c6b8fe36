"""Files that commands write at their end: whether they can be is found out at the start."""

import os
from pathlib import Path

from spectrumkv.client.cli.json_output import STDOUT
from spectrumkv.common.errors import InvalidArgumentError


def check_writable(flag: str, destination: str | None) -> None:
    """Refuse a file that could not be written, before minutes or hours are spent on what goes there.

    Nothing is created or cut short: the work may fail, and then an earlier result stays.

    Args:
        flag: what named the file ("--json"), for the error.
        destination: a path, "-" for standard output, or None for nowhere; both are always well.

    Raises:
        InvalidArgumentError: the name is empty, it is a folder's, its folder does not exist, or this user may not
            write there.
    """
    if destination is None or destination == STDOUT:
        return
    problem = _problem(destination)
    if problem is not None:
        raise InvalidArgumentError(f"{flag} {destination or repr('')}: {problem}; name a file that can be written")


def _problem(destination: str) -> str | None:
    if not destination:
        return "the name is empty"
    path = Path(destination)
    try:
        path.stat()
    except FileNotFoundError:
        # The folder that the file will be in, also where the name is a link that leads nowhere yet.
        place = path.resolve().parent
        if not place.is_dir():
            return "its folder does not exist"
    except OSError as error:
        return error.strerror
    else:
        if path.is_dir():
            return "it is a folder"
        place = path
    needed = os.W_OK | os.X_OK if place.is_dir() else os.W_OK
    return None if os.access(place, needed) else "it may not be written"
