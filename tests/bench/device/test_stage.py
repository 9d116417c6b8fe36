"""Stages end when their time is over, keep what they measured, and say why they were not run."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from spectrumkv.bench.device.report import FAILED, INCOMPLETE, PASSED, StageReport, StageSettings, result_path
from spectrumkv.bench.device.stage import GRACE_SECONDS, Outcome, Stage, run_stages
from tests.waiting import until

# What a stage's process does, with its settings as `settings` and a function that writes its file.
PRELUDE = """
import json, os, signal, subprocess, sys, time
settings = json.loads(sys.argv[1])
def write(rows=(), failures=(), not_run=(), notes=()):
    meta = {"failures": list(failures), "not_run": list(not_run), "notes": list(notes)}
    with open(settings["path"], "w") as file:
        json.dump({"meta": meta, "rows": list(rows)}, file)
"""


def run(
    folder: Path, scripts: dict[str, str], seconds: float = 100.0, stage_seconds: float = 60.0
) -> tuple[list[Outcome], list[str]]:
    """Run stages whose processes are these scripts; return their outcomes and the lines that were shown."""
    stages = [Stage(name, f"doing {name}", stage_seconds, 5.0) for name in scripts]
    paths = {name: folder / f"{name}.json" for name in scripts}
    said: list[str] = []

    def command(settings: StageSettings) -> Sequence[str]:
        return (sys.executable, "-c", PRELUDE + scripts[settings.stage], settings.to_json())

    return run_stages(stages, command, paths, False, seconds, said.append), said


def test_verdicts_follow_the_status_and_the_file(tmp_path: Path) -> None:
    outcomes, said = run(
        tmp_path,
        {
            "good": "write([{'a': 1}], notes=['no MPS here'])",
            "wrong": "write(failures=['a kernel differs']); sys.exit(1)",
            "short": "write(not_run=['32 streams']); sys.exit(3)",
            "broken": "sys.exit(1)",
            "killed": "os.kill(os.getpid(), signal.SIGSEGV)",
        },
    )
    assert [(one.verdict, one.status) for one in outcomes] == [
        ("passed", PASSED),
        ("failed", FAILED),
        ("incomplete", INCOMPLETE),
        ("failed", FAILED),
        ("failed", FAILED),
    ]
    assert outcomes[0].rows == ({"a": 1},)
    assert [one.reasons[0] for one in outcomes] == [
        "no MPS here",
        "a kernel differs",
        "32 streams",
        "its process ended with an error, which is on standard error",
        "its process ended with status -11",
    ]
    assert "good: doing good, at most 60 s" in said[0]
    assert said[1].endswith("good: passed\n        no MPS here")


@pytest.mark.slow
def test_a_stage_is_cut_off_and_keeps_its_rows(tmp_path: Path) -> None:
    # The inner process ignores SIGTERM, as a program that hangs does.
    script = """
ignoring = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
inner = subprocess.Popen([sys.executable, "-c", ignoring], stdout=subprocess.PIPE)
inner.stdout.readline()
write([{'inner': inner.pid}])
time.sleep(600)
"""
    (outcome,), said = run(tmp_path, {"slow": script}, stage_seconds=5.0)
    assert (outcome.verdict, outcome.status) == ("cut off", INCOMPLETE)
    assert outcome.reasons == ("its 5 s are over; 1 rows are kept",)
    assert "slow: cut off" in said[-1]
    until(lambda: not is_running(outcome.rows[0]["inner"]))


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_stage_without_time_is_not_begun(tmp_path: Path) -> None:
    (outcome,), said = run(tmp_path, {"late": "write([{}])"}, seconds=GRACE_SECONDS + 4.0)
    assert (outcome.verdict, outcome.status) == ("not run", INCOMPLETE)
    assert outcome.reasons == ("4 s are left, and it takes 5 s and more",)
    assert not (tmp_path / "late.json").exists()
    assert "late: not run" in said[0]


def test_a_stage_gets_no_more_than_what_is_left(tmp_path: Path) -> None:
    script = "write([{'seconds': settings['seconds']}])"
    (outcome,), _ = run(tmp_path, {"last": script}, seconds=GRACE_SECONDS + 10.0)
    assert outcome.rows[0]["seconds"] == pytest.approx(10.0, abs=1.0)


def test_an_earlier_result_stays_until_there_is_another(tmp_path: Path) -> None:
    path, earlier = tmp_path / "silent.json", json.dumps({"meta": {}, "rows": [{"old": True}]})
    path.write_text(earlier)
    for script in ("sys.exit(1)", "write(failures=['no device']); sys.exit(1)"):
        (outcome,), _ = run(tmp_path, {"silent": script})
        assert outcome.rows == ()
        assert path.read_text() == earlier
    # A stage may make a picture beside its file.
    run(
        tmp_path, {"silent": "write([{'new': 1}]); open(settings['path'].replace('json', 'png'), 'w').write('drawn')"}
    )
    assert json.loads(path.read_text())["rows"] == [{"new": 1}]
    assert path.with_suffix(".png").read_text() == "drawn"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["silent.json", "silent.png"]


def test_a_report_is_on_disk_after_every_part(tmp_path: Path) -> None:
    path = tmp_path / "device-codec-cpu.json"
    report = StageReport(StageSettings("codec", str(path), tiny=True, seconds=30.0))
    report.add([{"codec": "absmax"}])
    written = json.loads(path.read_text())
    assert (written["rows"], written["meta"]["complete"]) == ([{"codec": "absmax"}], False)
    assert 0 < report.seconds_left <= 30.0
    assert report.finish() == PASSED
    meta = json.loads(path.read_text())["meta"]
    assert (meta["complete"], meta["measurement"], meta["device"]) == (True, False, "cpu")
    assert "measures nothing" in meta["caveat"]
    assert meta["args"]["path"] == path.name
    report.not_run.append("a part")
    assert report.finish() == INCOMPLETE
    report.failures.append("an error")
    assert report.finish() == FAILED
    assert json.loads(path.read_text())["meta"]["failures"] == ["an error"]


def test_a_full_scale_report_is_a_measurement(tmp_path: Path) -> None:
    path = tmp_path / "device-codec-h200.json"
    StageReport(StageSettings("codec", str(path), tiny=False, seconds=30.0)).finish()
    meta = json.loads(path.read_text())["meta"]
    assert (meta["measurement"], meta["caveat"], meta["device"]) == (True, None, "cuda")


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H200", "device-codec-h200.json"),
        ("NVIDIA A100-SXM4-80GB", "device-codec-a100-sxm4-80gb.json"),
        ("NVIDIA GeForce RTX 4090", "device-codec-geforce-rtx-4090.json"),
        ("cpu", "device-codec-cpu.json"),
    ],
)
def test_a_file_is_named_after_stage_and_device(device: str, name: str) -> None:
    assert result_path(Path("results"), "codec", device) == Path("results", name)


def test_a_tiny_stage_sees_no_gpu(tmp_path: Path) -> None:
    stage, path = Stage("seen", "looking", 60.0, 5.0), tmp_path / "seen.json"
    script = PRELUDE + "write([{name: os.environ[name] for name in ('CUDA_VISIBLE_DEVICES', 'TRITON_INTERPRET')}])"
    (outcome,) = run_stages(
        [stage],
        lambda settings: (sys.executable, "-c", script, settings.to_json()),
        {"seen": path},
        True,
        100.0,
        lambda line: None,
    )
    assert outcome.rows == ({"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"},)
    assert os.environ.get("CUDA_VISIBLE_DEVICES") != ""
