"""Nobody reads what `spectrumkv up` says, or it cannot be written: it serves, and stops when asked."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from spectrumkv.client.client import SpectrumClient
from spectrumkv.client.local.pair_config import FREE_PORTS, plan_launches
from tests.client.local.test_killed_parent import services_of, wait_for_ends
from tests.client.local.test_running_pair import UP, fake_services

__all__ = ["fake_services"]

SECONDS = 30.0


@contextmanager
def output(kind: str) -> Iterator[int]:
    if kind == "a full disk":
        with open("/dev/full", "w") as full:
            yield full.fileno()
        return
    reading, writing = os.pipe()
    if kind == "a reader that has gone":
        os.close(reading)
        yield writing
    else:
        os.set_blocking(writing, False)
        with suppress(BlockingIOError):
            while True:
                os.write(writing, b"\n")
        os.set_blocking(writing, True)
        yield writing
        os.close(reading)
    os.close(writing)


@pytest.mark.parametrize("kind", ["a pipe that nobody reads", "a reader that has gone", "a full disk"])
def test_up_serves_and_stops(kind: str) -> None:
    decode, prefill = plan_launches({**FREE_PORTS, "model": "serves"})
    ports = {
        "--listen": prefill.address,
        "--decode": decode.address,
        "--metrics-listen": prefill.metrics_address,
        "--decode-metrics-listen": decode.metrics_address,
    }
    flags = [f"{flag}={address}" for flag, address in ports.items()]
    with output(kind) as place:
        command = [sys.executable, "-c", UP, "up", "--model=serves", *flags]
        process = subprocess.Popen(command, stdout=place, stderr=place)
        try:
            with SpectrumClient(str(prefill.address)) as client:
                client.wait_until_serving(SECONDS)
                assert client.generate("x").result().text == "Blue sky!"
            with services_of(process.pid) as services:
                process.send_signal(signal.SIGTERM)
                process.wait(SECONDS)
                wait_for_ends(services)
        finally:
            process.kill()
            process.wait()
