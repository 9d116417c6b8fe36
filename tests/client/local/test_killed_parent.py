"""`spectrumkv up` and `demo` are killed, mostly in a way that they cannot notice: their services end all the same."""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from spectrumkv.common.service.tied import tied
from tests.client.local.test_running_pair import ANY_PORTS, UP, fake_services

__all__ = ["fake_services"]

SECONDS = 20.0
# SIGHUP comes when a terminal is closed; `up` and `demo` stop their services in order then.
KILLS = [signal.SIGKILL, signal.SIGQUIT, signal.SIGHUP]


@contextmanager
def services_of(parent: int) -> Iterator[list[int]]:
    """Descriptors of the two processes that `parent` has started, whether or not they have ended since."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    with ExitStack() as opened:
        descriptors = [os.pidfd_open(int(child)) for child in children]
        for descriptor in descriptors:
            opened.callback(os.close, descriptor)
        assert len(descriptors) == 2
        yield descriptors


def wait_for_ends(services: list[int]) -> None:
    for service in services:
        assert select.select([service], [], [], SECONDS)[0], "a service lives on"


@pytest.mark.parametrize("number", KILLS, ids=lambda number: number.name)
@pytest.mark.parametrize("model", ["serves", "silent"])
@pytest.mark.parametrize("command", ["up", "demo"])
def test_no_service_outlives_its_parent(number: signal.Signals, model: str, command: str) -> None:
    ports = ANY_PORTS if command == "up" else []
    started = [sys.executable, "-c", UP, command, f"--model={model}", *ports]
    with subprocess.Popen(started, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        if model == "serves":
            assert any("ready" in line for line in process.stdout)
        else:
            assert all("flags:" in process.stderr.readline() for _ in range(2))
        with services_of(process.pid) as services:
            process.send_signal(number)
            wait_for_ends(services)


def test_a_service_that_does_not_stop_is_killed() -> None:
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); signal.pause()"
    command = tied((sys.executable, "-m", "timeit", "-n1", "-r1", deaf), 0.1)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"deaf\n"
        process.stdin.close()
        assert process.wait(SECONDS) == -signal.SIGKILL


def test_a_command_that_runs_no_module_stays_as_it_is() -> None:
    assert tied(("true", "-c"), 1.0) == ("true", "-c")
