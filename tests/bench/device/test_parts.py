"""Stages of several parts say which part was not run, and why; what stands in place of the parts measures nothing."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from spectrumkv.bench.device.report import FAILED, INCOMPLETE, PASSED, StageReport, StageSettings
from spectrumkv.bench.device.scale import CONTENDERS
from spectrumkv.bench.device.streams import serve_levels
from spectrumkv.bench.device.timeline import request
from spectrumkv.bench.device.timeline import stage as timeline
from spectrumkv.bench.device.timeline.request import TimelineRequest
from spectrumkv.common.errors import DeadlineExceededError, FailedPreconditionError, SpectrumKVError, UnavailableError


def report(folder: Path, seconds: float = 600.0) -> StageReport:
    return StageReport(StageSettings("streams", str(folder / "stage.json"), tiny=False, seconds=seconds))


def row(streams: int, failed: int = 0) -> dict[str, Any]:
    return {"streams": streams, "contender": "native", "failed": failed, "first_error": "UNAVAILABLE: gone"}


def test_every_level_is_served_while_there_is_time(tmp_path: Path) -> None:
    served = report(tmp_path)
    serve_levels(served, lambda streams: [row(streams)])
    assert [one["streams"] for one in served.rows] == [1, 8, 32]
    assert served.finish() == PASSED


def test_levels_without_time_are_named(tmp_path: Path) -> None:
    late = report(tmp_path, seconds=0.0)
    serve_levels(late, lambda streams: [row(streams)])
    assert late.rows == []
    assert [one.split(":")[0] for one in late.not_run] == ["1 streams", "8 streams", "32 streams"]
    assert late.finish() == INCOMPLETE


def test_failed_requests_make_the_stage_fail(tmp_path: Path) -> None:
    failing = report(tmp_path)
    serve_levels(failing, lambda streams: [row(streams, failed=int(streams == 8))])
    assert failing.failures == ["native at 8 streams: 1 failed, the first with UNAVAILABLE: gone"]
    assert failing.finish() == FAILED


class FakeDaemon:
    """Stands in for MPS, which some process has used or not."""

    def __init__(self, is_used: bool) -> None:
        self.environment = {"CUDA_MPS_PIPE_DIRECTORY": "pipe"}
        self._is_used = is_used

    def check_used(self) -> None:
        if not self._is_used:
            raise UnavailableError("nobody used MPS")


def run_timeline(
    measured: StageReport,
    monkeypatch: pytest.MonkeyPatch,
    mps: SpectrumKVError | None = None,
    with_mps: SpectrumKVError | None = None,
    is_used: bool = True,
) -> list[dict[str, Any]]:
    """Run the stage without processes; return the rows that were drawn."""
    drawn: list[dict[str, Any]] = []

    @contextmanager
    def mps_daemon() -> Iterator[FakeDaemon]:
        if mps is not None:
            raise mps
        yield FakeDaemon(is_used)

    def take_timelines(request: TimelineRequest, environment: Mapping[str, str], seconds: float) -> dict[str, Any]:
        assert seconds < measured.settings.seconds
        if "CUDA_MPS_PIPE_DIRECTORY" in environment and with_mps is not None:
            raise with_mps
        return {"model": {"name": request.shape}, "rows": [{"contender": name} for name in request.contenders]}

    monkeypatch.setattr(timeline, "mps_daemon", mps_daemon)
    monkeypatch.setattr(timeline, "take_timelines", take_timelines)
    monkeypatch.setattr(timeline, "draw_timelines", lambda rows, path, title: drawn.extend(rows))
    timeline.run(measured)
    return drawn


def expected(*modes: bool) -> list[dict[str, Any]]:
    return [{"mps": mode, "contender": name} for mode in modes for name in CONTENDERS]


def test_time_lines_are_taken_without_and_with_mps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = report(tmp_path)
    assert run_timeline(measured, monkeypatch) == measured.rows == expected(False, True)
    assert measured.model == {"name": "mistral-7b"}
    assert measured.finish() == PASSED


def test_a_machine_without_mps_passes_with_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = report(tmp_path)
    run_timeline(measured, monkeypatch, mps=FailedPreconditionError("it is not on PATH"))
    assert measured.rows == expected(False)
    assert measured.notes == ["with MPS: not run: it is not on PATH"]
    assert measured.finish() == PASSED


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"is_used": False}, "with MPS: nobody used MPS"),
        ({"with_mps": UnavailableError("the prefill side ended")}, "with MPS: the prefill side ended"),
        ({"with_mps": DeadlineExceededError("it took too long")}, "with MPS: it took too long"),
    ],
)
def test_time_lines_that_do_not_use_mps_are_not_counted_as_such(
    what: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = report(tmp_path)
    run_timeline(measured, monkeypatch, **what)
    assert measured.rows == expected(False)
    assert measured.not_run == [message]
    assert measured.finish() == INCOMPLETE


def test_mps_is_not_begun_without_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = report(tmp_path, seconds=timeline.LEAST_SECONDS / 2)
    run_timeline(measured, monkeypatch)
    assert measured.rows == expected(False)
    assert measured.not_run[0].startswith("with MPS: 1")


def test_a_prefill_side_that_fails_or_takes_too_long_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request, "PREFILL_MODULE", "no.such.module")
    asked = TimelineRequest("tiny", "cpu", 8, 1, ("native",))
    with pytest.raises(UnavailableError, match="the prefill side ended with status 1"):
        request.take_timelines(asked, {}, seconds=60.0)
    with pytest.raises(DeadlineExceededError, match="longer than the 0 s that were left"):
        request.take_timelines(asked, {}, seconds=0.0)


def test_a_request_reaches_the_process_as_it_was_asked() -> None:
    asked = TimelineRequest("tiny", "cpu", 8, 1, ("native", "spectral:absmax"))
    assert TimelineRequest.from_json(asked.to_json()) == asked
