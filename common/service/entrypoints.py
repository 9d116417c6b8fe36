"""Starts the services' commands.

This module imports nothing large: a service's libraries take seconds to import, and Ctrl-C in that time must end the
command without a traceback.
"""

import importlib
import signal


def prefill() -> None:
    """Run `spectrumkv-prefill`."""
    _run("spectrumkv.prefill_server.main")


def decode() -> None:
    """Run `spectrumkv-decode`."""
    _run("spectrumkv.decode_server.main")


def _run(module: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    main = importlib.import_module(module).main
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
