"""What health checks of containers run: one question, an exit status, no model library."""

import subprocess
import sys

import pytest

from spectrumkv.client.health import SERVER_VARIABLE, main
from tests.client.fake_servers import FakePrefill, prefill_server, serving


def test_a_server_that_is_ready_is_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(prefill_server(FakePrefill())) as address:
        assert main(["--server", address]) == 0
        monkeypatch.setenv(SERVER_VARIABLE, address)
        assert main([]) == 0


def test_a_server_that_drains_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    server = prefill_server(FakePrefill())
    with serving(server) as address:
        server._health.enter_graceful_shutdown()
        assert main(["--server", address]) == 1
        assert capsys.readouterr().err == f"{address} is not ready\n"


def test_a_server_that_is_not_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--server", "127.0.0.1:1"]) == 1
    assert capsys.readouterr().err.startswith("127.0.0.1:1: UNAVAILABLE: ")


def test_nothing_large_is_imported() -> None:
    code = "import sys, spectrumkv.client.health; print({'torch', 'numpy', 'transformers'} & sys.modules.keys())"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
    )
