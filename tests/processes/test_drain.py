"""SIGTERM and SIGHUP drain: not ready at once, running requests finish, a deadline ends the rest."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from spectrumkv.client.client import SpectrumClient
from spectrumkv.client.local.pair_config import plan_launches
from spectrumkv.client.local.service_process import ServiceLaunch
from spectrumkv.client.request import Sampling, TokenIds
from spectrumkv.common.errors import SpectrumKVError, UnavailableError
from tests.processes.conftest import options


def start(launch: ServiceLaunch) -> "subprocess.Popen[bytes]":
    process = subprocess.Popen(launch.command, stderr=subprocess.DEVNULL)
    with SpectrumClient(str(launch.address)) as client:
        client.wait_until_serving(60)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("drained", ["prefill", "decode"])
def test_running_requests_finish_and_new_ones_are_refused(
    tiny_llama: Path, drained: str, number: signal.Signals
) -> None:
    decode, prefill = plan_launches(options(tiny_llama))
    processes = {"decode": start(decode), "prefill": start(prefill)}
    try:
        with SpectrumClient(str(prefill.address)) as client:
            stream = client.generate(
                TokenIds((1, 2, 3)), sampling=Sampling(max_tokens=300, ignore_eos=True), timeout=60
            )
            next(stream)
            processes[drained].send_signal(number)
            until_refused(str(prefill.address))
            assert len(stream.result().tokens) == 300
        assert processes[drained].wait(30) == 0
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


def until_refused(address: str) -> None:
    """Ask for tokens until the signal has arrived and a request is turned away."""
    for _ in range(1000):
        try:
            with SpectrumClient(address) as client:
                client.generate(TokenIds((1,)), sampling=Sampling(max_tokens=2, ignore_eos=True), timeout=10).result()
        except UnavailableError:
            return
    raise AssertionError("no request was refused after the signal")


@pytest.mark.slow
def test_the_grace_ends(tiny_llama: Path) -> None:
    decode, prefill = plan_launches(options(tiny_llama, grace="0"))
    processes = [start(decode), start(prefill)]
    try:
        with SpectrumClient(str(prefill.address)) as client:
            stream = client.generate(
                TokenIds((1, 2, 3)), sampling=Sampling(max_tokens=1500, ignore_eos=True), timeout=60
            )
            next(stream)
            processes[1].send_signal(signal.SIGTERM)
            with pytest.raises(SpectrumKVError):
                stream.result()
        assert processes[1].wait(30) == 0
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_a_configuration_error_is_a_sentence_and_status_1() -> None:
    command = [sys.executable, "-m", "spectrumkv.decode_server.main", "--kv-memory", "lots"]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert outcome.returncode == 1
    assert outcome.stderr.strip().splitlines()[-1] == (
        "error: --kv-memory is 'lots'; allowed: a positive number of bytes such as 512MiB or 4GiB"
    )
