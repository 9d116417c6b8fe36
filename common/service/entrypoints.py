"""Starts the services' commands.

This module imports nothing large: a service's libraries take seconds to import, and Ctrl-C in that time must end the
command without a traceback.
"""

import importlib
import os
import signal

from spectrumkv.common.service import cgroup


def prefill() -> None:
    """Run `spectrumkv-prefill`."""
    _run("spectrumkv.prefill_server.main")


def decode() -> None:
    """Run `spectrumkv-decode`."""
    _run("spectrumkv.decode_server.main")


def heed_processor_limit() -> None:
    """Let libraries start no more threads than the process's control group keeps busy.

    They count the machine's processors. With more threads than its share the group is stopped for a part of each
    period, while threads that hold locks wait. The number must be known before the libraries are imported.
    """
    limit = cgroup.processor_limit()
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if limit is not None and limit < there:
        os.environ.setdefault("OMP_NUM_THREADS", str(limit))


def _run(module: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    heed_processor_limit()
    main = importlib.import_module(module).main
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
