"""The check itself, tried with tiny shapes on a CPU: what it writes, and what it says where it cannot run."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from spectrumkv.bench.device import device_check_command
from spectrumkv.bench.device.device_check_command import STAGES
from spectrumkv.bench.device.report import INCOMPLETE, PASSED
from spectrumkv.bench.device.scale import BUDGET, CONTENDERS, TINY
from spectrumkv.bench.device.stage import Outcome, Stage
from spectrumkv.bench.device.stage_process import MODULES
from spectrumkv.bench.device.summary import SUMMARIES
from spectrumkv.bench.device.timeline.handoff import MOMENTS
from spectrumkv.bench.main import main

# Moments of two processes are those of one clock, which counts in nanoseconds.
CLOCK_SECONDS = 1e-6


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_machine_without_a_gpu_is_told_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["device-check", "--results", str(tmp_path)]) == 1
    assert "no CUDA device is here; --tiny" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stages", "kernels,codek"], "--stages has 'codek'; allowed: kernels, codec, model, timeline, streams"),
        (["--results", "not/there"], "its folder does not exist"),
    ],
)
def test_wrong_flags_are_refused_before_anything_runs(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["device-check", "--tiny", *flags]) == 1
    assert message in " ".join(capsys.readouterr().err.split())


def test_every_stage_has_a_module_and_a_summary() -> None:
    names = [stage.name for stage in STAGES]
    assert names == list(MODULES) == list(SUMMARIES)
    assert all(stage.least_seconds < stage.seconds for stage in STAGES)


def test_where_no_time_is_left_nothing_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["device-check", "--tiny", "--limit", "20", "--results", str(tmp_path)]) == INCOMPLETE
    captured = capsys.readouterr()
    assert captured.out.count("not run") == len(STAGES)
    assert captured.err.count("not run") == len(STAGES)
    assert not list(tmp_path.iterdir())


def test_tiny_numbers_are_no_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, tiny_results = tmp_path / "results", tmp_path / "build" / "device-check"
    results.mkdir()
    monkeypatch.setattr(device_check_command, "RESULTS", results)
    monkeypatch.setattr(device_check_command, "TINY_RESULTS", tiny_results)
    asked: dict[str, Path] = {}

    def run_stages(stages: Sequence[Stage], command: Any, paths: dict[str, Path], *rest: Any) -> list[Outcome]:
        asked.update(paths)
        return [Outcome(stage.name, "passed") for stage in stages]

    monkeypatch.setattr(device_check_command, "run_stages", run_stages)
    assert main(["device-check", "--tiny"]) == PASSED
    assert asked == {stage.name: tiny_results / f"device-{stage.name}-cpu.json" for stage in STAGES}
    assert tiny_results.is_dir()


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_all_stages_run_with_tiny_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["device-check", "--tiny", "--limit", "900", "--results", str(tmp_path)]) == PASSED
    table = capsys.readouterr().out
    assert table.count(" passed ") >= len(STAGES)
    assert "measures nothing" in " ".join(table.split())
    results: dict[str, dict[str, Any]] = {
        stage.name: json.loads((tmp_path / f"device-{stage.name}-cpu.json").read_text()) for stage in STAGES
    }
    for name, result in results.items():
        meta = result["meta"]
        assert (meta["stage"], meta["device"], meta["complete"], meta["measurement"]) == (name, "cpu", True, False)
        assert not meta["failures"] + meta["not_run"]
        assert result["rows"]
    kernels = results["kernels"]["rows"]
    assert all(row["passed"] and not row["failed"] + row["skipped"] for row in kernels)
    assert any("kernels/absmax" in row["test"] for row in kernels)
    codecs = {row["codec"] for row in results["codec"]["rows"]}
    assert codecs >= {"absmax-kernels", "absmax", "native"}
    assert results["model"]["rows"][0]["shape"] == TINY.shape
    check_timelines(results["timeline"]["rows"])
    assert (tmp_path / "device-timeline-cpu.png").exists()
    served = results["streams"]["rows"]
    assert [(row["streams"], row["contender"]) for row in served] == [
        (streams, name) for streams in TINY.streams for name in CONTENDERS
    ]
    for row in served:
        assert row["failed"] == 0
        assert row["total_output_tokens"] == row["completed"] * TINY.output_tokens
        assert min(row["median_ttft_ms"], row["median_tpot_ms"], row["median_itl_ms"], row["output_throughput"]) > 0


def check_timelines(rows: list[dict[str, Any]]) -> None:
    """Check that every layer passed every moment in order, and that the bytes are those of the contender."""
    without = [row for row in rows if not row["mps"]]
    assert [row["contender"] for row in without] == list(CONTENDERS)
    for row in without:
        assert [layer["layer"] for layer in row["layers"]] == list(range(TINY.layers))
        for layer in row["layers"]:
            moments = [layer[name] for name in MOMENTS]
            assert all(earlier <= later + CLOCK_SECONDS for earlier, later in pairwise(moments)), layer
        assert len(row["rounds"]) == TINY.timeline_rounds
        assert row["handoff_ms"] > 0
        if row["policy"] == "spectral":
            assert row["budget_counted"] <= BUDGET
    counted = {row["contender"]: row["budget_counted"] for row in without}
    # The tiny model computes in float32 on a CPU.
    assert 2.0 < counted["native"] < 2.05
    # Its budget counts neither scales nor framing.
    assert counted["adaptive"] == pytest.approx(BUDGET, abs=0.05)
