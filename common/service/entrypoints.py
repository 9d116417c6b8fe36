"""The services' commands. Their libraries take seconds to import, and Ctrl-C meanwhile ends a command in silence."""

import importlib
import signal


def prefill() -> None:
    """`spectrumkv-prefill`."""
    _run("spectrumkv.prefill_server.main")


def decode() -> None:
    """`spectrumkv-decode`."""
    _run("spectrumkv.decode_server.main")


def _run(module: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    main = importlib.import_module(module).main
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
