"""Stage `timeline`: take time lines on one device, prefill and decode each a process, without and with MPS."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spectrumkv.bench.device.report import StageReport
from spectrumkv.bench.device.scale import CONTENDERS
from spectrumkv.bench.device.timeline.mps import mps_daemon
from spectrumkv.bench.device.timeline.plots import draw_timelines
from spectrumkv.bench.device.timeline.request import TimelineRequest, take_timelines
from spectrumkv.common.errors import DeadlineExceededError, FailedPreconditionError, UnavailableError

# With less time left, time lines with MPS are not begun: the model alone takes so long to load.
LEAST_SECONDS = 30.0
# Left for ending the processes and for the picture.
END_SECONDS = 5.0


def run(report: StageReport) -> None:
    """Take the time lines, and report a row for each contender, without and with MPS; draw them beside the file.

    Raises:
        SpectrumKVError: the model cannot be had, or a process failed.
    """
    report.add(_take(report, os.environ, with_mps=False))
    if report.seconds_left < LEAST_SECONDS:
        report.not_run.append(f"with MPS: {report.seconds_left:.0f} s are left, and it takes {LEAST_SECONDS:g} s")
    else:
        _run_with_mps(report)
    scale = report.settings.scale
    picture = Path(report.settings.path).with_suffix(".png")
    draw_timelines(report.rows, str(picture), f"{scale.shape}, {scale.tokens} tokens")


def _run_with_mps(report: StageReport) -> None:
    try:
        with mps_daemon() as daemon:
            rows = _take(report, daemon.environment, with_mps=True)
            daemon.check_used()
    except FailedPreconditionError as error:
        report.notes.append(f"with MPS: not run: {error.message}")
    except (UnavailableError, DeadlineExceededError) as error:
        report.not_run.append(f"with MPS: {error.message}")
    else:
        report.add(rows)


def _take(report: StageReport, environment: Mapping[str, str], with_mps: bool) -> list[dict[str, Any]]:
    scale = report.settings.scale
    request = TimelineRequest(scale.shape, scale.device, scale.tokens, scale.timeline_rounds, CONTENDERS)
    result = take_timelines(request, environment, max(report.seconds_left - END_SECONDS, 0.0))
    report.model = result["model"]
    return [{"mps": with_mps} | row for row in result["rows"]]
