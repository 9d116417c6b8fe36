"""MPS has directories of its own and ends for certain; a program in place of NVIDIA's notes what it is told."""

import os
import sys
from pathlib import Path

import pytest

from spectrumkv.bench.device.timeline.mps import PROGRAM, mps_daemon
from spectrumkv.common.errors import FailedPreconditionError, UnavailableError

# The daemon serves a named pipe in its directory; the control program writes questions there and prints the answer.
DAEMON = """#!{python}
import os, sys
pipe = os.environ["CUDA_MPS_PIPE_DIRECTORY"]
questions, answers = (os.path.join(pipe, name) for name in ("questions", "answers"))
if sys.argv[1:] == ["-f"]:
    with open({notes!r}, "a") as notes:
        notes.write(f"start {{os.getpid()}} {{pipe}} {{os.environ['CUDA_MPS_LOG_DIRECTORY']}}\\n")
    {start}
    os.mkfifo(answers)
    os.mkfifo(questions)
    while True:
        with open(questions) as asked:
            question = asked.read().strip()
        with open(answers, "w") as answer:
            answer.write({servers!r} if question == "get_server_list" else "")
        with open({notes!r}, "a") as notes:
            notes.write(question + "\\n")
        if question == "quit" and not {deaf}:
            break
else:
    if not os.path.exists(questions):
        sys.exit(1)
    with open(questions, "w") as asked:
        asked.write(sys.stdin.read())
    with open(answers) as answer:
        print(answer.read())
"""


def install(
    folder: Path, monkeypatch: pytest.MonkeyPatch, start: str = "pass", servers: str = "4711", deaf: bool = False
) -> Path:
    """Put a program in place of NVIDIA's on PATH; return the file in which it notes what it is told."""
    notes, program = folder / "notes", folder / PROGRAM
    text = DAEMON.format(python=sys.executable, notes=str(notes), start=start, servers=servers, deaf=deaf)
    program.write_text(text)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return notes


def is_there(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_a_daemon_has_its_own_directories_and_ends_with_the_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = install(tmp_path, monkeypatch)
    with mps_daemon() as daemon:
        pipe, log = (daemon.environment[f"CUDA_MPS_{name}_DIRECTORY"] for name in ("PIPE", "LOG"))
        daemon.check_used()
        start, pid, *places = notes.read_text().splitlines()[0].split()
        assert (start, places) == ("start", [pipe, log])
        assert pipe != log
        assert is_there(int(pid))
        assert "CUDA_MPS_PIPE_DIRECTORY" not in os.environ
    assert notes.read_text().splitlines()[-1] == "quit"
    assert not is_there(int(pid))
    assert not Path(pipe).exists()


def test_a_daemon_that_does_not_quit_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spectrumkv.bench.device.timeline.mps.END_SECONDS", 1.0)
    notes = install(tmp_path, monkeypatch, deaf=True)
    with pytest.raises(RuntimeError, match="of the block"), mps_daemon():
        raise RuntimeError("of the block")
    assert not is_there(int(notes.read_text().splitlines()[0].split()[1]))


def test_a_daemon_that_nobody_used_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, servers="")
    with mps_daemon() as daemon, pytest.raises(UnavailableError, match="has started no server"):
        daemon.check_used()


def test_a_daemon_that_does_not_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, start="sys.exit('this GPU has no MPS')")
    with pytest.raises(FailedPreconditionError, match="ended with status 1: this GPU has no MPS"), mps_daemon():
        pass


def test_a_machine_without_mps_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FailedPreconditionError, match="not on PATH"), mps_daemon():
        pass
