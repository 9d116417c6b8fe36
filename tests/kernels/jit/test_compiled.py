"""What was compiled is used again by the same code only, and goes when nobody uses it any more."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from spectrumkv import kernels

CALLEE = """
from spectrumkv.kernels.jit.compiled import compiled
@compiled
def number():
    return {number}
"""
CALLER = """
from spectrumkv.kernels.jit.callee import number
from spectrumkv.kernels.jit.compiled import compiled
@compiled
def called():
    return number()
"""
# No file can grow beyond a few bytes, as on a disk that is full.
FULL = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))"
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda content: content[:40],
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "half zeros": lambda content: content[: len(content) // 2] + bytes(len(content) - len(content) // 2),
    "text": lambda content: b"not code at all",
}
RUN = """
from spectrumkv.kernels.jit.caller import called
print(called(), sum(called.stats.cache_hits.values()))
"""


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A folder with kernels of its own, two of which are one calling the other."""
    folder = tmp_path / "spectrumkv" / "kernels" / "jit"
    folder.mkdir(parents=True)
    for name in ("__init__.py", "jit/__init__.py", "jit/cache.py", "jit/compiled.py"):
        shutil.copy(Path(kernels.__path__[0]) / name, folder.parent / name)
    (folder / "caller.py").write_text(CALLER)
    (folder / "callee.py").write_text(CALLEE.format(number=1))
    return folder


def run(copied: Path, before: str = "", **variables: str) -> tuple[int, int]:
    """What the caller returns in a process of its own, and how much of it was in the cache."""
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"} | variables
    # Python itself keeps half of a module's bytecode where the disk is full, and fails on it later (importlib).
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", before + RUN],
        env=environment | {"PYTHONPATH": str(copied.parents[2])},
        cwd=copied.parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    number, hits = done.stdout.split()
    return int(number), int(hits)


@pytest.mark.parametrize("variable", ["SPECTRUMKV_CACHE", pytest.param("NUMBA_CACHE_DIR", marks=pytest.mark.slow)])
def test_what_a_function_calls_may_change(copied: Path, tmp_path: Path, variable: str) -> None:
    kept = {variable: str(tmp_path / "kept")}
    assert run(copied, **kept) == (1, 0)
    assert run(copied, **kept) == (1, 1)
    (copied / "callee.py").write_text(CALLEE.format(number=2))
    assert run(copied, **kept) == (2, 0)


@pytest.mark.slow
@pytest.mark.parametrize("variable", ["SPECTRUMKV_CACHE", "NUMBA_CACHE_DIR"])
def test_where_nothing_can_be_kept_nothing_is(copied: Path, tmp_path: Path, variable: str) -> None:
    (tmp_path / "file").write_text("no directory")
    kept = {variable: str(tmp_path / "file")}
    assert run(copied, **kept) == (1, 0)
    (copied / "callee.py").write_text(CALLEE.format(number=2))
    assert run(copied, **kept) == (2, 0)
    assert not list(copied.rglob("*.nbi"))


@pytest.mark.parametrize(
    "damage", ["cut", *(pytest.param(name, marks=pytest.mark.slow) for name in DAMAGES if name != "cut")]
)
def test_damaged_code_is_compiled_anew(copied: Path, tmp_path: Path, damage: str) -> None:
    kept = {"SPECTRUMKV_CACHE": str(tmp_path / "kept")}
    assert run(copied, **kept) == (1, 0)
    for kind in ("*called*.nbi", "*called*.nbc"):
        (file,) = (tmp_path / "kept").rglob(kind)
        file.write_bytes(DAMAGES[damage](file.read_bytes()))
        assert run(copied, **kept) == (1, 0)
    assert run(copied, **kept) == (1, 1)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["*called*.nbi", "*called*.nbc"])
@pytest.mark.parametrize("what", ["a pipe", "a vast file", "a directory"])
def test_something_else_in_the_place_of_code_holds_up_no_start(
    copied: Path, tmp_path: Path, kind: str, what: str
) -> None:
    kept = {"SPECTRUMKV_CACHE": str(tmp_path / "kept")}
    assert run(copied, **kept) == (1, 0)
    (file,) = (tmp_path / "kept").rglob(kind)
    if what == "a vast file":
        os.truncate(file, 40 << 30)
    else:
        file.unlink()
        os.mkfifo(file) if what == "a pipe" else file.mkdir()
    assert run(copied, **kept) == (1, 0)
    # Only a directory stays, and costs the time of compiling.
    assert run(copied, **kept) == (1, what != "a directory")


SEVERAL = """
from spectrumkv.kernels.jit.compiled import compiled
@compiled
def called(row):
    return row[0]
"""
RUN_SEVERAL = """
import sys
import numpy as np
from spectrumkv.kernels.jit.caller import called
row = np.full(1, 0xFFFF, np.uint16)
kinds = {"int16": row.view(np.int16), "uint16": row}
print(*(called(kinds[name]) for name in sys.argv[1:]), sum(called.stats.cache_hits.values()))
"""


def test_code_for_other_types_is_not_taken_for_what_is_asked_for(copied: Path, tmp_path: Path) -> None:
    """Two processes that compile for other types at once may each write the list of what is kept, and one file."""
    (copied / "caller.py").write_text(SEVERAL)

    def called(*names: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(copied.parents[2]), "SPECTRUMKV_CACHE": str(tmp_path / "kept")}
        command = [sys.executable, "-c", RUN_SEVERAL, *names]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=120, check=True
        ).stdout

    assert called("int16") == "-1 0\n"
    (code,) = (tmp_path / "kept").rglob("*.nbc")
    (index,) = (tmp_path / "kept").rglob("*.nbi")
    signed = code.read_bytes()
    index.unlink()
    assert called("uint16") == "65535 0\n"
    # The first process was slower in writing its code than the second one.
    code.write_bytes(signed)
    assert called("uint16") == "65535 0\n"
    assert called("uint16", "int16") == "65535 -1 1\n"
    assert called("uint16", "int16") == "65535 -1 2\n"


def test_a_full_disk_only_costs_time(copied: Path, tmp_path: Path) -> None:
    kept = {"SPECTRUMKV_CACHE": str(tmp_path / "kept")}
    assert run(copied, FULL, **kept) == (1, 0)
    assert not [file for file in (tmp_path / "kept").rglob("*") if ".tmp." in file.name]
    assert run(copied, **kept) == (1, 0)
    assert run(copied, **kept) == (1, 1)


def test_what_nobody_used_for_long_goes(copied: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept" / "compiled"
    old, young, foreign = (kept / name for name in ("0" * 16, "1" * 16, "of somebody else"))
    for directory, days in ((old, 31), (young, 29), (foreign, 31)):
        directory.mkdir(parents=True)
        (directory / "code.nbi").write_text("code")
        then = time.time() - days * 86400
        os.utime(directory, (then, then))
    assert run(copied, SPECTRUMKV_CACHE=str(tmp_path / "kept")) == (1, 0)
    assert not old.exists()
    assert young.exists()
    assert foreign.exists()
    assert len(list(kept.iterdir())) == 3
