"""`spectrumkv up` is killed, while its real services load, and while they serve a request."""

import os
import signal
import subprocess
import sys

import pytest

from spectrumkv.client.client import SpectrumClient
from spectrumkv.client.local.pair_config import plan_launches
from spectrumkv.client.request import Sampling, TokenIds
from tests.client.local.test_killed_parent import services_of, wait_for_ends
from tests.processes.conftest import options
from tests.tiny_models import tiny_model

UP = [sys.executable, "-m", "spectrumkv.client.cli.main", "up"]
TOKENS = 300


def flags(options: dict[str, str]) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGQUIT], ids=lambda number: number.name)
def test_while_they_load(number: signal.Signals) -> None:
    command = [*UP, *flags(options(tiny_model("llama")))]
    # Python then says what it imports.
    environment = os.environ | {"PYTHONVERBOSE": "1"}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stderr is not None
        assert any(line.startswith(b"prefill | ") and b"import 'torch." in line for line in process.stderr)
        with services_of(process.pid) as services:
            process.send_signal(number)
            wait_for_ends(services)


@pytest.mark.slow
def test_while_they_serve_a_request_which_still_ends() -> None:
    decode, prefill = plan_launches(options(tiny_model("llama")))
    ports = {
        "listen": prefill.address,
        "decode": decode.address,
        "metrics_listen": prefill.metrics_address,
        "decode_metrics_listen": decode.metrics_address,
    }
    command = [*UP, *flags(options(tiny_model("llama"), **{name: str(port) for name, port in ports.items()}))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert any(line.startswith(b"ready") for line in process.stdout)
        client = SpectrumClient(str(prefill.address))
        with client, services_of(process.pid) as services:
            sampling = Sampling(max_tokens=TOKENS, ignore_eos=True)
            stream = client.generate(TokenIds((1, 2, 3)), sampling=sampling, timeout=60)
            next(stream)
            process.kill()
            assert len(stream.result().tokens) == TOKENS
            wait_for_ends(services)
