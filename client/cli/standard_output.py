"""Standard output whose errors are told from those of other files."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO, cast


class OutputError(OSError):
    """Standard output cannot be written: its disk is full, say."""


@contextmanager
def named_output() -> Iterator[None]:
    """Meanwhile, what goes wrong in writing to standard output is an OutputError; at the end all is written.

    A reader that left stays a BrokenPipeError.
    """
    # None where the process was started without one.
    if sys.stdout is None:
        yield
        return
    with redirect_stdout(cast("TextIO", _NamedOutput(sys.stdout))):
        yield
        sys.stdout.flush()


class _NamedOutput:
    """Stands in for `sys.stdout`: all but the two ways to write are its own."""

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


@contextmanager
def _errors_named() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(error.errno, error.strerror) from error
