"""Stage `timeline`: take time lines on one device, prefill and decode each a process, without and with MPS."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spectrumkv.bench.device.report import StageReport
from spectrumkv.bench.device.scale import CONTENDERS
from spectrumkv.bench.device.timeline import prefill_process
from spectrumkv.bench.device.timeline.mps import mps_daemon
from spectrumkv.bench.device.timeline.plots import draw_timelines
from spectrumkv.bench.device.timeline.prefill_process import TimelineRequest
from spectrumkv.bench.models.shaped_model import shaped_model_directory
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
    scale = report.settings.scale
    request = TimelineRequest(
        model=str(shaped_model_directory(scale.shape)),
        device=scale.device,
        tokens=scale.tokens,
        rounds=scale.timeline_rounds,
        contenders=CONTENDERS,
    )
    report.add(_take(request, report, os.environ, with_mps=False))
    if report.seconds_left < LEAST_SECONDS:
        report.not_run.append(f"with MPS: {report.seconds_left:.0f} s are left, and it takes {LEAST_SECONDS:g} s")
    else:
        try:
            with mps_daemon() as daemon:
                rows = _take(request, report, daemon.environment, with_mps=True)
                daemon.check_used()
            report.add(rows)
        except FailedPreconditionError as error:
            report.notes.append(f"with MPS: not run: {error.message}")
        except (UnavailableError, DeadlineExceededError) as error:
            report.not_run.append(f"with MPS: {error.message}")
    picture = Path(report.settings.path).with_suffix(".png")
    draw_timelines(report.rows, str(picture), f"{scale.shape}, {scale.tokens} tokens")


def _take(
    request: TimelineRequest, report: StageReport, environment: Mapping[str, str], with_mps: bool
) -> list[dict[str, Any]]:
    """Return the rows of a prefill process that runs in an environment.

    Raises:
        UnavailableError: the process failed.
        DeadlineExceededError: it took longer than the stage may.
    """
    seconds = max(report.seconds_left - END_SECONDS, 0.0)
    with subprocess.Popen(  # noqa: S603  # our own interpreter and module
        [sys.executable, "-m", prefill_process.__name__, request.to_json()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env=dict(environment),
        text=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise DeadlineExceededError(
                f"the time lines took longer than the {seconds:.0f} s that were left"
            ) from None
        finally:
            process.kill()
    if process.returncode:
        raise UnavailableError(
            f"the prefill side ended with status {process.returncode}; its error is on standard error"
        )
    result = json.loads(output)
    report.model = result["model"]
    return [{"mps": with_mps} | row for row in result["rows"]]
