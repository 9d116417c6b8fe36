"""Runs a service's module, and stops the service when the process that started it has ended, however it ended.

The service's standard input is a pipe whose other end only the parent has. The kernel closes that end when the parent
is gone, killed by SIGKILL too, and on every system. Linux could send the service a signal instead
(PR_SET_PDEATHSIG), but does so already when the thread that started it ends.

This module imports nothing large: the service's libraries take seconds to import, and the parent may be killed in
that time, too.
"""

import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

STDIN = 0


def tied(command: Sequence[str], stop_seconds: float) -> tuple[str, ...]:
    """Return the command whose service stops when its standard input ends.

    Args:
        command: runs a module, as `python -m MODULE FLAGS…`; others stay as they are.
        stop_seconds: how long the service may take to stop after SIGTERM, before it is killed.

    Returns:
        The command.
    """
    if "-m" not in command:
        return tuple(command)
    place = command.index("-m") + 1
    return (*command[:place], __name__, f"{stop_seconds:g}", *command[place:])


def main() -> None:
    """Run `python -m spectrumkv.common.service.tied SECONDS MODULE FLAGS…`."""
    seconds, module, *flags = sys.argv[1:]
    threading.Thread(target=_stop_when_alone, args=(float(seconds),), name="parent", daemon=True).start()
    sys.argv = [module, *flags]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _stop_when_alone(stop_seconds: float) -> None:
    with suppress(OSError):
        while os.read(STDIN, 64):
            pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(stop_seconds)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
