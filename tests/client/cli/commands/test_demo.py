"""`make demo` as users run it: real services, the embedded model."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from spectrumkv.client.local.pair_config import FREE_PORTS
from spectrumkv.client.local.running_pair import running_pair
from tests.tiny_models import tiny_model, write_weights_that_no_memory_holds

COMMAND = [sys.executable, "-m", "spectrumkv.client.cli.main"]


@pytest.fixture
def base_model(tmp_path: Path) -> Path:
    """A model without a chat template, with a context of 512 tokens."""
    directory = Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))
    config = json.loads((directory / "config.json").read_text()) | {"max_position_embeddings": 512}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").unlink()
    return directory


@pytest.mark.slow
def test_demo_asks_a_base_model_with_a_short_context(base_model: Path) -> None:
    command = [*COMMAND, "demo", "--model", str(base_model)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert len(re.findall(r"^budget \S+, \w+ policy", done.stdout, re.M)) == 3


@pytest.mark.slow
def test_demo_says_which_command_takes_an_option_that_a_service_names(base_model: Path) -> None:
    write_weights_that_no_memory_holds(base_model / "model.safetensors")
    command = [*COMMAND, "demo", "--model", str(base_model)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 1
    assert "name a smaller model or --dtype bfloat16" in done.stderr
    assert "spectrumkv up takes every option that the services name" in done.stdout


@pytest.mark.slow
def test_check_asks_a_base_model_with_a_short_context(base_model: Path) -> None:
    with running_pair({"model": str(base_model), "int4": "on", **FREE_PORTS}) as pair:
        command = [*COMMAND, "check", "--server", str(pair.address), "--json", "-"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["ok"] is True


@pytest.mark.slow
def test_demo_answers_from_the_document_at_every_budget():
    command = [*COMMAND, "demo"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    answers = re.findall(r"^budget (\S+), \w+ policy ─*\n(.*)$", done.stdout, re.M)
    assert [budget for budget, _ in answers] == ["1", "0.5", "0.3"]
    assert all("Josiah Penrose" in answer for _, answer in answers)
    rows = re.findall(r"^ +(1|0\.5|0\.3)  +(\S+) +(\d\.\d{3}) ", done.stdout, re.M)
    assert rows[0][1] == "fp16"
    assert [float(counted) for _, _, counted in rows] == pytest.approx([1.0, 0.5, 0.3], abs=0.05)
