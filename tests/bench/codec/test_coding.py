"""`coding`: what a prompt's KV costs to code."""

import json
from pathlib import Path

import pytest

from spectrumkv.bench.main import main
from tests.tiny_models import tiny_model

ARGUMENTS = ("coding", "--model", str(tiny_model("llama")), "--int4", "on", "--tokens", "256", "--rounds", "2")


@pytest.mark.slow
def test_shares_are_those_of_the_times(tmp_path: Path) -> None:
    result = tmp_path / "coding.json"
    policies = ("--policies", "spectral,adaptive,uniform-int3", "--budgets", "0.5")
    assert main([*ARGUMENTS, *policies, "--json", str(result)]) == 0
    written = json.loads(result.read_text())
    rows = written["rows"]
    assert [(row["policy"], row["codec"]) for row in rows] == [("spectral", "spectral"), ("adaptive", "absmax")]
    assert written["meta"]["load_average_before"] is not None
    for row in rows:
        assert 200 < row["prompt_tokens"] <= 256
        assert min(row["encode_seconds"], row["decode_seconds"], row["prefill_seconds"]) > 0
        coding = row["encode_seconds"] + row["decode_seconds"]
        assert row["share_of_prefill"] == pytest.approx(coding / row["prefill_seconds"])
        processor = row["encode_processor_seconds"] + row["decode_processor_seconds"]
        assert row["processor_share_of_prefill"] == pytest.approx(processor / row["prefill_processor_seconds"])


def test_what_encodes_nothing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ARGUMENTS, "--policies", "uniform-int3"]) == 1
    assert "--policies names only baselines" in capsys.readouterr().err
    assert main(["coding", "--rounds", "0"]) == 1
    assert "--rounds is 0; allowed: 1 or more" in capsys.readouterr().err
