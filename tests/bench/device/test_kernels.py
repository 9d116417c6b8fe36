"""The stage of kernels counts what pytest tells it, and ends pytest when its time is over."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import pytest

from spectrumkv.bench.device import kernels
from spectrumkv.bench.device.kernels import END_SECONDS, OutcomeCounter
from spectrumkv.bench.device.report import StageReport, StageSettings
from spectrumkv.bench.device.scale import FULL
from spectrumkv.common.errors import FailedPreconditionError


def report(folder: Path, seconds: float = 60.0) -> StageReport:
    return StageReport(StageSettings("kernels", str(folder / "kernels.json"), tiny=True, seconds=seconds))


def session(tests: int) -> Any:
    return SimpleNamespace(items=[None] * tests, shouldstop=False)


def told(
    nodeid: str, when: Literal["setup", "call", "teardown"], outcome: Literal["passed", "failed", "skipped"]
) -> pytest.TestReport:
    text = "a trace\nE  codes differ" if outcome == "failed" else None
    return pytest.TestReport(nodeid, ("file.py", 1, "name"), {}, outcome, text, when, duration=0.25)


def test_each_test_counts_once(tmp_path: Path) -> None:
    counter = OutcomeCounter(report(tmp_path))
    counter.pytest_collection_finish(session(4))
    for number, outcome in enumerate(("passed", "failed", "passed")):
        counter.pytest_runtest_logreport(told(f"file.py::test_codes[{number}]", "setup", "passed"))
        counter.pytest_runtest_logreport(told(f"file.py::test_codes[{number}]", "call", cast("Any", outcome)))
        counter.pytest_runtest_logreport(told(f"file.py::test_codes[{number}]", "teardown", "passed"))
    counter.pytest_runtest_logreport(told("file.py::test_on_a_gpu", "setup", "skipped"))
    counter.pytest_runtest_logreport(told("file.py::test_on_a_gpu", "teardown", "passed"))
    assert counter.rows == [
        {"test": "file.py::test_codes", "passed": 2, "failed": 1, "skipped": 0, "seconds": 2.25},
        {"test": "file.py::test_on_a_gpu", "passed": 0, "failed": 0, "skipped": 1, "seconds": 0.5},
    ]
    assert counter.run == counter.collected == 4
    assert counter.first_failure == "file.py::test_codes[1]: E  codes differ"


def test_pytest_ends_when_the_time_is_over(tmp_path: Path) -> None:
    running, over = OutcomeCounter(report(tmp_path)), OutcomeCounter(report(tmp_path, END_SECONDS / 2))
    sessions = []
    for counter in (running, over):
        sessions.append(session(2))
        counter.pytest_collection_finish(sessions[-1])
        counter.pytest_runtest_logreport(told("file.py::test_codes[0]", "call", "passed"))
    assert not sessions[0].shouldstop
    assert sessions[1].shouldstop == "the stage has no time left"
    assert over.run < over.collected


@pytest.mark.slow
def test_every_kernel_in_triton_has_tests_that_the_check_runs() -> None:
    listed = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"),
            *("-m", "not slow and not exhaustive", "-k", FULL.kernel_tests, *kernels.TESTS),
        ],
        cwd=kernels.ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    operations = [path.parent.name for path in kernels.ROOT.glob("kernels/*/triton.py")]
    assert operations
    assert [name for name in operations if f"tests/kernels/{name}/" not in listed] == []
    assert [test for test in functions_that_use_triton() if test not in listed] == []


def functions_that_use_triton() -> list[str]:
    """Return the tests of kernels in whose body a module `triton` or `…_triton` is used."""
    found = []
    for path in sorted(kernels.ROOT.glob("tests/kernels/**/test_*.py")):
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
                continue
            names = {one.id for part in node.body for one in ast.walk(part) if isinstance(one, ast.Name)}
            if any(name.split("_")[-1] == "triton" for name in names):
                found.append(f"{path.relative_to(kernels.ROOT).as_posix()}::{node.name}")
    assert found
    return found


def test_without_tests_the_stage_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "ROOT", tmp_path)
    with pytest.raises(FailedPreconditionError, match=r"tests/kernels is not in .* from a checkout"):
        kernels.run(report(tmp_path))
