"""`spectrumkv up` over a prefill whose forward pass hangs ends as it is told to, and so do its services."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spectrumkv.client.client import SpectrumClient
from spectrumkv.client.local.pair_config import plan_launches
from spectrumkv.client.request import Sampling, TokenIds
from spectrumkv.common.errors import SpectrumKVError
from spectrumkv.common.service.serving import STOP_SECONDS
from tests.client.local.test_killed_parent import services_of, wait_for_ends
from tests.faults import sabotage
from tests.processes.conftest import options
from tests.tiny_models import tiny_model

# `up` whose prefill service can be broken from inside.
UP = (
    "import sys; from spectrumkv.client.local import pair_config as p; "
    "p.PREFILL_MODULE = 'tests.faults.sabotaged_prefill'; "
    "from spectrumkv.client.cli.main import main; sys.exit(main(['up', *sys.argv[1:]]))"
)
GRACE_SECONDS = 1.0
# For two cores that others use, too.
SLACK_SECONDS = 15.0


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_it_ends_with_its_services(tmp_path: Path, number: signal.Signals) -> None:
    switch = tmp_path / "switch"
    decode, prefill = plan_launches(options(tiny_model("llama")))
    places = {"listen": prefill.address, "decode": decode.address, "metrics_listen": prefill.metrics_address}
    settings = options(tiny_model("llama"), grace=f"{GRACE_SECONDS:g}", **{k: str(v) for k, v in places.items()})
    command = [sys.executable, "-c", UP, *(f"--{name.replace('_', '-')}={text}" for name, text in settings.items())]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, env=os.environ | {"SABOTAGE_SWITCH": str(switch)}
        )
    with process, SpectrumClient(str(prefill.address)) as client:
        assert process.stdout is not None
        assert any(line.startswith(b"ready") for line in process.stdout)
        with services_of(process.pid) as services:
            switch.write_text(sabotage.FROZEN_PASS)
            stream = client.generate(TokenIds((1, 2, 3)), sampling=Sampling(max_tokens=4), timeout=240)
            until_said(tmp_path / "log", sabotage.FROZEN)
            told_at = time.monotonic()
            process.send_signal(number)
            wait_for_ends(services)
            assert process.wait(SLACK_SECONDS) == 0
            assert time.monotonic() - told_at < GRACE_SECONDS + STOP_SECONDS + SLACK_SECONDS
            with pytest.raises(SpectrumKVError):
                stream.result()
    said = (tmp_path / "log").read_text()
    assert "in _freeze" in said, "the stack of the pass that hangs"
    assert "Traceback (most" not in said


def until_said(log: Path, text: str) -> None:
    """Look into a log until it has a text."""
    deadline = time.monotonic() + 60
    while text not in log.read_text(errors="replace"):
        assert time.monotonic() < deadline, f"the log does not say {text!r}"
        time.sleep(0.02)
