"""Writes log lines to standard error without waiting for whoever reads it.

A pipe that nobody reads, a terminal that Ctrl-S has stopped, a full disk: none of them may stop a service. Lines that
find no room wait, a bounded number of them; beyond that they are dropped and counted
(`spectrumkv_log_lines_dropped_total`). Where there is room, a line is written before the call that logs it returns:
the last words of a process that dies are there. With the standard library's QueueHandler they would be lost, since
its lines wait for a thread.
"""

import atexit
import logging
import os
import select
import stat
import sys
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress

STDOUT, STDERR = 1, 2
# Lines that wait for room; some hundred bytes each.
MAX_WAITING_LINES = 500
# How long the end of the process waits for the lines that wait.
FLUSH_SECONDS = 1.0


class LineOutput:
    """Writes lines to a file descriptor, and drops them instead of waiting.

    Args:
        descriptor: of a file, a pipe, a socket or a terminal; it stays open.
        formatted: returns the line that reports dropped ones, for a sentence that says how many.

    Attributes:
        dropped: how many lines were dropped.
    """

    def __init__(self, descriptor: int, formatted: Callable[[str], str] = str) -> None:
        self._descriptor = descriptor
        self._formatted = formatted
        self._changed = threading.Condition()
        # The first may be the rest of a line of which a part is written.
        self._waiting: deque[memoryview] = deque()
        self.dropped = 0
        self._told = 0
        self._count: Callable[[int], object] = lambda lines: None
        threading.Thread(target=self._write_as_room_comes, name="line-output", daemon=True).start()

    def write_line(self, line: str) -> None:
        """Write a line if there is room, or else let it wait, or drop it.

        Args:
            line: without the newline.
        """
        with self._changed:
            if len(self._waiting) >= MAX_WAITING_LINES:
                self._drop()
                return
            self._waiting.append(memoryview(self._told_of_drops() + _encoded(line)))
            self._write_what_fits()
            self._changed.notify_all()

    def count_with(self, count: Callable[[int], object]) -> None:
        """Let `count` be called with the number of lines that were dropped, now and whenever more are."""
        with self._changed:
            self._count = count
            count(self.dropped)

    def flush(self) -> None:
        """Wait until all lines are written, for at most a second."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting, FLUSH_SECONDS)

    def _drop(self) -> None:
        self.dropped += 1
        self._count(1)

    def _told_of_drops(self) -> bytes:
        """Return a line that says how many lines were dropped, if more were since the last one; else nothing."""
        if self.dropped == self._told:
            return b""
        self._told = self.dropped
        sentence = f"{self.dropped} log lines were dropped so far: nobody read them, or they could not be written"
        return _encoded(self._formatted(sentence))

    def _write_what_fits(self) -> bool:
        """Write until there is no room.

        Returns:
            Whether every line could be written or waits.
        """
        dropped_before = self.dropped
        while self._waiting and _has_room(self._descriptor, 0):
            line = self._waiting.popleft()
            try:
                # So many bytes fit where there is room at all.
                written = os.write(self._descriptor, line[: select.PIPE_BUF])
            except BlockingIOError:
                written = 0
            except OSError:
                # The reader has gone, or the disk is full.
                self._drop()
                continue
            if written < len(line):
                self._waiting.appendleft(line[written:])
            if not written:
                break
        return self.dropped == dropped_before

    def _write_as_room_comes(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting))
            _has_room(self._descriptor, None)
            with self._changed:
                if self._write_what_fits() and not self._waiting and (told := self._told_of_drops()):
                    self._waiting.append(memoryview(told))
                self._changed.notify_all()


class LogOutput(logging.Handler):
    """Writes each record as a line, and drops lines instead of waiting.

    Args:
        descriptor: of a file, a pipe, a socket or a terminal; it stays open.

    Attributes:
        lines: what the lines go to.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.lines = LineOutput(descriptor, self._warning)

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record's line if there is room, or else let it wait, or drop it."""
        try:
            line = self.format(record)
        except Exception:  # noqa: BLE001  # logging's own handlers treat a record that cannot be formatted so
            self.handleError(record)
        else:
            self.lines.write_line(line)

    def flush(self) -> None:
        """Wait until all lines are written, for at most a second."""
        self.lines.flush()

    def _warning(self, text: str) -> str:
        return self.format(logging.LogRecord(__name__, logging.WARNING, "", 0, text, None, None))


def count_dropped_lines(count: Callable[[int], object]) -> None:
    """Let `count` be called with the number of log lines that this process has dropped, and of each later one."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, LogOutput):
            handler.lines.count_with(count)


def flush_log() -> None:
    """Wait until all log lines are written, for at most a second, so that what follows comes after them."""
    for handler in logging.getLogger().handlers:
        handler.flush()


def open_log() -> LogOutput:
    """Return a handler for standard error, and let no other writer wait for its reader either.

    Besides this process's own log lines there are those of C libraries, such as gRPC's about failed handshakes, whose
    threads must not wait. On Linux a pipe is opened a second time as one that never blocks: the flag belongs to the
    opened file, and the first one may be shared with other processes.
    """
    prepare_standard_streams()
    if sys.stderr is None:
        # The process was started without one, and libraries count on it.
        sys.stderr = open(STDERR, "w", encoding="utf-8", closefd=False)  # noqa: SIM115  # it stays open
    for descriptor in (STDOUT, STDERR):
        with suppress(OSError):
            if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
                again = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK)
                os.dup2(again, descriptor)
                os.close(again)
    return LogOutput(STDERR)


def prepare_standard_streams() -> None:
    """Open the null device where a standard stream is closed, and keep the exit status where standard error is full.

    Otherwise the next socket that is opened gets the number of the closed one, and what is meant for standard error
    goes there. And what standard error did not take, Python writes once more at the end: where that fails, too, it
    makes the exit status 120.
    """
    while (opened := os.open(os.devnull, os.O_RDWR)) <= STDERR:
        pass
    os.close(opened)
    atexit.unregister(_forget_what_is_left)
    atexit.register(_forget_what_is_left)


def _forget_what_is_left() -> None:
    try:
        if sys.stderr is not None:
            sys.stderr.flush()
    except OSError:
        # Nobody is left to tell.
        lead_nowhere(STDERR)


def lead_nowhere(descriptor: int) -> None:
    """Redirect a descriptor to the null device, so that what is left for it cannot fail once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def _encoded(line: str) -> bytes:
    return f"{line}\n".encode("utf-8", "backslashreplace")


def _has_room(descriptor: int, seconds: float | None) -> bool:
    """Return whether a descriptor takes bytes, or has an error, within so many seconds; None sets no end."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return bool(poll.poll(None if seconds is None else seconds * 1000))
