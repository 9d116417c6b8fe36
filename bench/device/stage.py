"""Run the stages of a device check in turn, each in a process of its own that is ended when its time is over.

A process of its own also gives back the GPU's memory, and survives what a broken kernel does to its neighbours.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spectrumkv.bench.device.report import FAILED, INCOMPLETE, PASSED, StageSettings
from spectrumkv.common.service.tied import tied

# Seconds for a stage to stop what it started, once it is told to end.
GRACE_SECONDS = 15.0
STDERR = 2
VERDICTS = {PASSED: "passed", FAILED: "failed", INCOMPLETE: "incomplete"}
CUT_OFF, NOT_RUN = "cut off", "not run"


@dataclass(frozen=True)
class Stage:
    """Describe a stage.

    Attributes:
        name: of its module's `run`, its file and its row.
        doing: what it does, for the line of progress.
        seconds: the most that it may take, but at the tiny scale.
        least_seconds: with less than this left it is not begun.
    """

    name: str
    doing: str
    seconds: float
    least_seconds: float


@dataclass(frozen=True)
class Outcome:
    """Say how a stage went.

    Attributes:
        stage: name of the stage.
        verdict: one of `VERDICTS`, "cut off" or "not run".
        reasons: why it did not pass, or what its notes say.
        seconds: that it took.
        rows: what it measured.
    """

    stage: str
    verdict: str
    reasons: tuple[str, ...] = ()
    seconds: float = 0.0
    rows: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)

    @property
    def status(self) -> int:
        """Return the exit status that this stage alone would give the check."""
        known = {verdict: status for status, verdict in VERDICTS.items()}
        return known.get(self.verdict, INCOMPLETE)


def run_stages(
    stages: Sequence[Stage],
    command: Callable[[StageSettings], Sequence[str]],
    paths: Mapping[str, Path],
    tiny: bool,
    seconds: float,
    say: Callable[[str], None],
) -> list[Outcome]:
    """Run stages until all are done or the time is over.

    Args:
        stages: in the order in which they run.
        command: returns the command of a stage's process.
        paths: result file of each stage, by its name. A stage that measures nothing leaves an earlier one alone.
        tiny: whether the stages run at the tiny scale.
        seconds: that all stages together may take.
        say: shows a line of progress.

    Returns:
        An outcome for each stage.
    """
    began = time.monotonic()
    outcomes = []
    for stage in stages:
        passed = time.monotonic() - began
        left = seconds - passed - GRACE_SECONDS
        if left < stage.least_seconds:
            reason = f"{max(left, 0):.0f} s are left, and it takes {stage.least_seconds:g} s and more"
            outcome = Outcome(stage.name, NOT_RUN, (reason,))
        else:
            # Tiny stages measure nothing, so that one may take what it needs on a busy machine.
            most = left if tiny else min(stage.seconds, left)
            say(f"{passed:4.0f} s  {stage.name}: {stage.doing}, at most {most:.0f} s")
            with tempfile.TemporaryDirectory() as folder:
                settings = StageSettings(stage.name, str(Path(folder, paths[stage.name].name)), tiny, most)
                outcome = _run_stage(settings, command(settings))
                if outcome.rows:
                    _keep(Path(folder), paths[stage.name].parent)
        details = "".join(f"\n        {reason}" for reason in outcome.reasons)
        say(f"{time.monotonic() - began:4.0f} s  {stage.name}: {outcome.verdict}{details}")
        outcomes.append(outcome)
    return outcomes


def _run_stage(settings: StageSettings, command: Sequence[str]) -> Outcome:
    started = time.monotonic()
    with _process(command, settings.tiny) as process:
        status: int | None
        try:
            status = process.wait(settings.seconds)
        except subprocess.TimeoutExpired:
            status = None
    meta, rows = _read(Path(settings.path))
    reasons = [*meta.get("failures", ()), *meta.get("not_run", ()), *meta.get("notes", ())]
    seconds = time.monotonic() - started
    if status is None:
        reasons.insert(0, f"its {settings.seconds:.0f} s are over; {len(rows)} rows are kept")
        return Outcome(settings.stage, CUT_OFF, tuple(reasons), seconds, tuple(rows))
    if status not in VERDICTS:
        reasons.insert(0, f"its process ended with status {status}")
    elif status == FAILED and not meta.get("failures"):
        reasons.insert(0, "its process ended with an error, which is on standard error")
    return Outcome(settings.stage, VERDICTS.get(status, VERDICTS[FAILED]), tuple(reasons), seconds, tuple(rows))


@contextmanager
def _process(command: Sequence[str], tiny: bool) -> Iterator["subprocess.Popen[bytes]"]:
    """Yield a stage's process, which has a process group of its own; all of the group ends with the block."""
    environment = dict(os.environ)
    if tiny:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    process = subprocess.Popen(  # noqa: S603  # our own interpreter and module
        tied(command, GRACE_SECONDS), stdin=subprocess.PIPE, stdout=STDERR, env=environment, process_group=0
    )
    try:
        yield process
    finally:
        try:
            process.terminate()
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            # Whatever the stage started and did not end is in its group.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if process.stdin is not None:
                process.stdin.close()


def _keep(made: Path, results: Path) -> None:
    """Put what a stage made in the place of an earlier result, which stays where a stage measured nothing."""
    for file in made.iterdir():
        shutil.copyfile(file, results / file.name)


def _read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the `meta` and the rows of a stage's file; nothing where it wrote none, or was ended as it wrote."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}, []
    return content["meta"], content["rows"]


def stage_command(settings: StageSettings) -> Sequence[str]:
    """Return the command that runs `bench.device.stage_process`."""
    return (sys.executable, "-m", "spectrumkv.bench.device.stage_process", settings.to_json())
