"""Starts the services' commands.

This module imports nothing large: a service's libraries take seconds to import, and Ctrl-C in that time must end the
command without a traceback.
"""

import importlib.util
import os
import signal
import sys
from pathlib import Path

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.service import machine
from spectrumkv.common.telemetry.log_output import prepare_standard_streams


def prefill() -> None:
    """Run `spectrumkv-prefill`."""
    _run("spectrumkv-prefill", "spectrumkv.prefill_server.main", "PrefillConfig")


def decode() -> None:
    """Run `spectrumkv-decode`."""
    _run("spectrumkv-decode", "spectrumkv.decode_server.main", "DecodeConfig")


def gateway() -> None:
    """Run `spectrumkv-gateway`."""
    prepare_standard_streams()
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        needed = " and ".join(missing)
        sys.exit(f"error: the gateway needs {needed}; install them with: pip install 'spectrumkv[gateway]'")
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _call_main("spectrumkv.gateway.main")


def limit_threads(threads: int | None) -> None:
    """Let libraries start so many threads, and by default no more than this process may keep busy.

    They heed the affinity, and know nothing of a control group's quota. With more threads than its share a group is
    stopped for a part of each period, while threads that hold locks wait. The number must be known before the
    libraries are imported.

    Args:
        threads: what --threads says; with None OMP_NUM_THREADS counts, where it is set.
    """
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    elif machine.processors() < machine.affinity():
        os.environ.setdefault("OMP_NUM_THREADS", str(machine.processors()))


def _run(program: str, module: str, config_class: str) -> None:
    prepare_standard_streams()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    limit_threads(_threads_asked_for(program, config_class))
    _call_main(module)


def _call_main(module: str) -> None:
    """Import a large module, and run it; Ctrl-C raises KeyboardInterrupt from then on."""
    try:
        Path.cwd()
    except FileNotFoundError:
        # MKL would end the process, and say that it cannot load a library of torch's.
        sys.exit("error: the working directory was removed; start the service in another one")
    main = importlib.import_module(module).main
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()


def _threads_asked_for(program: str, config_class: str) -> int | None:
    configuration = importlib.import_module("spectrumkv.common.service.config")
    command_line = importlib.import_module("spectrumkv.common.service.command_line")
    try:
        threads: int | None = command_line.load(getattr(configuration, config_class), sys.argv[1:], program).threads
    except InvalidArgumentError:
        # The service reads its options once more and says what is wrong.
        return None
    return threads
