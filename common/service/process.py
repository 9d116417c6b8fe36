"""Runs the process of a service: logging, start, signals, exit."""

import atexit
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from spectrumkv.common.errors import SpectrumKVError
from spectrumkv.common.telemetry.log_output import flush_log, open_log
from spectrumkv.common.telemetry.request_log import FORMATTERS

# From glibc's malloc.h.
M_ARENA_MAX = -8
# The exit status that shells report for a program that SIGINT ended.
EXIT_INTERRUPTED = 130


def set_up_logging(level: str, log_format: str = "text") -> None:
    """Log to stderr, one line for each event; nothing ever waits for whoever reads them.

    Args:
        level: the least severe level to log.
        log_format: "text" or "json".
    """
    handler = open_log()
    handler.setFormatter(FORMATTERS[log_format]())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def run(serve: Callable[[], None]) -> NoReturn:
    """Run a service until a signal stops it, and end the process. While it loads, each signal ends it at once.

    Args:
        serve: loads what requests need, and serves. Its `SpectrumKVError` becomes a sentence and exit status 1.
    """
    keep_one_arena()
    # Until the service takes its signals itself: what it loads may be long in C, where Python takes none.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    exit_on_error(serve)
    leave(0)


def exit_on_error(main: Callable[[], None]) -> None:
    """Run `main`, and turn its `SpectrumKVError` into a sentence and exit status 1.

    Ctrl-C while `main` runs ends the process with exit status 130.

    Args:
        main: the program.
    """
    try:
        main()
    except SpectrumKVError as error:
        sys.exit(f"error: {error.message}")
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    finally:
        # What the exit says comes after the log.
        flush_log()


def keep_one_arena() -> None:
    """Let glibc allocate all of the process's memory from one arena; with other C libraries this does nothing.

    By default glibc gives each thread an arena of its own, and keeps the memory that an arena once needed. Requests
    run on dozens of threads, so the unused memory of arenas let a service grow for hours (docs/faults.md, "Soak").
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").mallopt(M_ARENA_MAX, 1)


def leave(status: int) -> NoReturn:
    """End the process, after the functions registered with `atexit` and the last log lines.

    The libraries' own tear-down is skipped. With it, gRPC's threads aborted the process (SIGABRT, without a message)
    in one of three exits that followed a cancelled request at once.

    Args:
        status: the exit status.
    """
    atexit._run_exitfuncs()
    logging.shutdown()
    os._exit(status)


def stopping_signals() -> tuple[signal.Signals, ...]:
    """Return the signals that stop a process in order.

    SIGHUP says that the terminal is gone; it stays ignored where it is ignored, as under nohup. Nothing is read again
    for it: a service looks at its certificates and tokens by itself.
    """
    hangs_up = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    return (signal.SIGTERM, signal.SIGINT, *((signal.SIGHUP,) if hangs_up else ()))
