"""How long `spectrumkv up` takes until it says that it is ready."""

import signal
import subprocess
import sys
import time
from collections.abc import Mapping

from spectrumkv.client.local.pair_config import FREE_PORTS
from spectrumkv.common.errors import UnavailableError
from spectrumkv.common.service.config import flag_name

READY = "ready;"


def seconds_to_ready(options: Mapping[str, str]) -> float:
    """Start `spectrumkv up` in a process of its own, wait until it is ready, and stop it.

    Args:
        options: of both services, beside free ports.

    Returns:
        From the start of the process until both services answered requests.

    Raises:
        UnavailableError: it ended instead.
    """
    flags = [f"{flag_name(name)}={value}" for name, value in {**FREE_PORTS, **options}.items()]
    started = time.monotonic()
    process = subprocess.Popen(  # noqa: S603  # our own interpreter and module
        [sys.executable, "-u", "-m", "spectrumkv.client.cli.main", "up", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        if process.stdout is None:
            raise RuntimeError("the process was started without a pipe")
        for line in process.stdout:
            if line.startswith(READY):
                return time.monotonic() - started
        raise UnavailableError(
            f"`spectrumkv up {' '.join(flags)}` ended with status {process.wait()} before it was ready"
        )
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate()
