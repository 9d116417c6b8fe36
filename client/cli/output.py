"""Write JSON to files or standard output, check files before the work starts, and name output errors."""

import codecs
import errno
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO, cast

from google.protobuf.message import Message

from spectrumkv.common.errors import InvalidArgumentError

STDOUT = "-"


def message_as_json(message: Message) -> dict[str, Any]:
    """Return all fields of a message by their proto names, defaults included.

    Unlike protobuf's own mapping, 64-bit integers stay numbers, bytes are hexadecimal, and an unset optional field is
    None.
    """
    return {field.name: _field(message, field) for field in message.DESCRIPTOR.fields}


def write_json(content: dict[str, Any], destination: str) -> None:
    """Write one JSON object.

    Args:
        content: an object that JSON can express.
        destination: a path, or "-" for standard output.

    Raises:
        InvalidArgumentError: the file cannot be written.
    """
    if destination == STDOUT:
        # Where standard output is not UTF-8, escapes say the same.
        sys.stdout.write(_as_text(content, escaped=codecs.lookup(sys.stdout.encoding).name != "utf-8"))
        return
    try:
        Path(destination).write_text(_as_text(content, escaped=False), encoding="utf-8")
    except OSError as error:
        raise InvalidArgumentError(
            f"--json {destination}: {error.strerror}; name a file that can be written"
        ) from error


def _as_text(content: dict[str, Any], escaped: bool) -> str:
    return json.dumps(content, indent=2, ensure_ascii=escaped) + "\n"


def _field(message: Message, field: Any) -> Any:
    value = getattr(message, field.name)
    if field.is_repeated:
        return [_value(one, field) for one in value]
    if field.has_presence and not message.HasField(field.name):
        return None
    return _value(value, field)


def _value(value: Any, field: Any) -> Any:
    if field.message_type is not None:
        return message_as_json(value)
    if field.enum_type is not None:
        return field.enum_type.values_by_number[value].name
    return value.hex() if isinstance(value, bytes) else value


def check_writable(flag: str, destination: str | None) -> None:
    """Refuse a file that could not be written, before minutes or hours are spent on its content.

    The file is neither created nor truncated: if the work fails, an earlier result stays.

    Args:
        flag: the flag that names the file ("--json"), for the error message.
        destination: a path; "-" for standard output and None for no output are always allowed.

    Raises:
        InvalidArgumentError: the name is empty or a folder's, its folder does not exist, or this user may not write
            there.
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
        # The folder that the file will be in. The name may also be a link whose target does not exist yet.
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


def show_any_character() -> None:
    """Let standard output show "?" for characters that its encoding lacks, as standard error shows escapes.

    An answer may hold any character, and a terminal's encoding may be ASCII.
    """
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


class OutputError(OSError):
    """Report that standard output cannot be written, for example because its disk is full."""


@contextmanager
def named_output() -> Iterator[None]:
    """Raise OutputError for errors of standard output during the block, and flush it at the end.

    If the reader of a pipe has closed it, the error stays a BrokenPipeError.
    """
    # It is None if the process was started without standard output.
    output = _NamedOutput(sys.stdout) if sys.stdout is not None else _ClosedOutput()
    with redirect_stdout(cast("TextIO", output)):
        yield
        sys.stdout.flush()


class _NamedOutput:
    """Wrap `sys.stdout`, and name the errors of its two methods that write."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with _errors_named():
            return self._stream.write(text)

    def flush(self) -> None:
        with _errors_named():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _ClosedOutput:
    """Stand in for a standard output that the process was started without: writing fails."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        raise OutputError(errno.EBADF, os.strerror(errno.EBADF))

    def flush(self) -> None:
        """Do nothing: there is nothing to flush."""

    def isatty(self) -> bool:
        return False


@contextmanager
def _errors_named() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(error.errno, error.strerror) from error
