"""`--check-config` of the real commands: what would be served, or what is wrong, and nothing is loaded."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from spectrumkv.common.errors import FailedPreconditionError, InvalidArgumentError
from spectrumkv.common.model import embedded
from spectrumkv.common.model.load import load_model
from spectrumkv.common.model.outline import outline_model
from spectrumkv.common.service import machine
from spectrumkv.common.service.config import DecodeConfig, PrefillConfig, build
from spectrumkv.common.service.config_check import EXIT_UNUSABLE, Line, model_lines, run_check, server_lines
from spectrumkv.common.service.start_checks import check_start
from tests.common.security.certificates import Authority
from tests.tiny_models import tiny_model

FREE = {"listen": "127.0.0.1:0", "metrics_listen": "127.0.0.1:0"}


@pytest.fixture(scope="module")
def llama() -> Path:
    return tiny_model("llama")


def served(model: Path, kv_memory: str = "64MiB") -> dict[str, str]:
    config = build(DecodeConfig, FREE | {"model": str(model), "kv_memory": kv_memory})
    return dict(model_lines(config, "--kv-memory", config.kv_memory))


def test_it_says_which_model_is_served_and_how_many_tokens_have_room(llama: Path) -> None:
    lines = served(llama)
    assert "(llama), 3 layers, 2 KV heads of 64" in lines["model"]
    assert "in float32 on cpu" in lines["weights"]
    # 3 layers of 2 heads of 64, keys and values, 4 bytes each.
    assert lines["--kv-memory"] == f"64.0 MiB, which holds {(64 << 20) // 3072} tokens of 3072 bytes"


def test_the_size_of_the_weights_is_that_of_what_is_loaded(llama: Path) -> None:
    name = str(llama)
    outline = outline_model(name, "cpu", "auto")
    assert outline is not None
    loaded = load_model(name, "cpu", "auto", packed=False)
    stored = sum(one.numel() * one.element_size() for one in loaded.model.parameters())
    assert outline.weight_bytes == stored
    assert outline.geometry == loaded.geometry
    assert outline.context_length == loaded.context_length


def test_what_has_no_room_beside_the_weights_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "bytes_left", lambda: 65 << 20)
    with pytest.raises(FailedPreconditionError, match="together more than"):
        served(llama)
    monkeypatch.setattr(machine, "bytes_left", lambda: None)
    assert served(llama)["memory"] == "not known"


def test_memory_for_less_than_a_token_is_refused(llama: Path) -> None:
    with pytest.raises(FailedPreconditionError, match="holds no token"):
        served(llama, "1KiB")


def test_a_model_that_cannot_be_served_is_refused(tmp_path: Path, llama: Path) -> None:
    model = shutil.copytree(llama, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": -3}))
    with pytest.raises(FailedPreconditionError, match="num_hidden_layers"):
        served(model)
    (model / "config.json").write_text(json.dumps(config))
    (model / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(FailedPreconditionError, match="safetensors"):
        served(model)


def test_a_model_that_is_not_here_is_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "cache_directory", lambda: tmp_path)
    config = build(PrefillConfig, FREE)
    assert list(model_lines(config, "--prefill-kv-memory", None)) == [
        ("model", "the embedded default, which is not here and is fetched at the start")
    ]
    assert list(tmp_path.iterdir()) == []


def test_it_says_until_when_certificates_hold(tmp_path: Path) -> None:
    authority = Authority("check")
    files = authority.issue(lasts=timedelta(days=-1)).write(tmp_path, authority)
    options = {"tls_cert": str(files.cert), "tls_key": str(files.key), "tls_ca": str(files.ca)}
    lines = dict(server_lines(build(DecodeConfig, FREE | options)))
    assert lines["listens"].endswith("TLS")
    assert lines["--tls-cert"].endswith("which is over")
    assert "over" not in lines["--tls-ca"]


def test_an_address_that_the_running_service_has_is_no_trouble_and_a_foreign_one_is() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        check_start(build(DecodeConfig, FREE | {"listen": address}), may_run=True)
    foreign = build(DecodeConfig, FREE | {"listen": "192.0.2.1:50052", "allow_plaintext": True})
    with pytest.raises(InvalidArgumentError, match="cannot be listened on"):
        check_start(foreign, may_run=True)


def test_the_exit_status_tells(capsys: pytest.CaptureFixture[str]) -> None:
    def usable() -> Iterator[Line]:
        yield "a", "one"
        yield "bcd", "two"

    def unusable() -> Iterator[Line]:
        yield "a", "one"
        raise FailedPreconditionError("it does not fit")

    with pytest.raises(SystemExit) as ended:
        run_check(usable)
    assert ended.value.code == 0
    assert capsys.readouterr().out == "a    one\nbcd  two\n"
    with pytest.raises(SystemExit) as ended:
        run_check(unusable)
    assert ended.value.code == EXIT_UNUSABLE == 2
    written = capsys.readouterr()
    assert (written.out, written.err) == ("", "error: it does not fit\n")


def run(module: str, *flags: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", f"spectrumkv.{module}", "--check-config", *flags],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "flags", "status", "said"),
    [
        ("decode_server", ["--kv-memory=64MiB"], 0, "tokens of 3072 bytes"),
        ("decode_server", ["--tls-cert=/nowhere", "--tls-key=/nowhere"], 2, "--tls-cert /nowhere cannot be read"),
        ("prefill_server", ["--decode=localhost:1"], 0, "localhost:1, now 127.0.0.1:1"),
        ("prefill_server", ["--model=/nowhere"], 2, "'/nowhere' is not a directory"),
    ],
)
def test_the_commands_check_and_serve_nothing(
    llama: Path, module: str, flags: list[str], status: int, said: str
) -> None:
    ended: Any = run(module, f"--model={llama}", *flags)
    assert ended.returncode == status, ended.stderr
    assert said in (ended.stderr if status else ended.stdout)
    assert "serving" not in ended.stderr
