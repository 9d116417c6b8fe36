"""Arriving KV beside running streams, and starts: both on a tiny model, in real processes."""

import json
from pathlib import Path

import pytest

from spectrumkv.bench.main import main
from tests.tiny_models import tiny_model

ARRIVALS_KEYS = [
    "policy", "codec", "budget_target", "budget_counted", "arriving_tokens", "streams", "arrivals", "arrival_ms",
    "undisturbed_gaps", "median_undisturbed_itl_ms", "p99_undisturbed_itl_ms", "arrival_gaps",
    "median_arrival_itl_ms", "p99_arrival_itl_ms", "median_itl_ratio", "p99_itl_ratio",
]  # fmt: skip


@pytest.mark.slow
def test_streams_run_while_kv_arrives(tmp_path: Path) -> None:
    result = tmp_path / "arrivals.json"
    flags = ["--streams", "2", "--running-tokens", "5", "--arriving-tokens", "300", "--arrivals", "3"]
    flags += ["--pause-tokens", "2", "--policies", "native,uniform-int8"]
    assert main(["arrivals", "--model", str(tiny_model("llama")), *flags, "--json", str(result)]) == 0
    rows = json.loads(result.read_text())["rows"]
    assert [list(row) for row in rows] == [ARRIVALS_KEYS] * 2
    assert [row["codec"] for row in rows] == ["native", "absmax"]
    for row in rows:
        # An arrival is within a gap of each stream at least.
        assert row["arrival_gaps"] >= 3 * 2
        # The pauses: what of a pause's tokens does not touch an arrival.
        assert row["undisturbed_gaps"] >= 2
        assert row["p99_itl_ratio"] == pytest.approx(row["p99_arrival_itl_ms"] / row["p99_undisturbed_itl_ms"])
    assert rows[0]["budget_counted"] > 1.9
    assert rows[1]["budget_counted"] == pytest.approx(0.53, abs=0.05)


def test_senseless_arrivals_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["arrivals", "--model", str(tiny_model("llama")), "--streams", "0"]) == 1
    assert "--streams, --arrivals and --pause-tokens must each be 1 or more" in capsys.readouterr().err


@pytest.mark.slow
def test_starts_are_timed(tmp_path: Path) -> None:
    result = tmp_path / "startup.json"
    assert main(["startup", "--model", str(tiny_model("llama")), "--rounds", "1", "--json", str(result)]) == 0
    (row,) = json.loads(result.read_text())["rows"]
    assert row["command"] == "spectrumkv up"
    assert row["rounds"] == 1
    assert min(row["first_ready_seconds"], row["median_ready_seconds"]) > 1
    assert row["median_ready_seconds"] == row["max_ready_seconds"]


@pytest.mark.slow
def test_a_start_that_fails_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["startup", "--model", "/nowhere/at/all", "--rounds", "1"]) == 1
    assert "before it was ready" in capsys.readouterr().err
