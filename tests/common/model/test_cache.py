import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import platformdirs
import pytest

from spectrumkv.common.errors import FailedPreconditionError
from spectrumkv.common.model.cache import build_once, cache_directory

BUILD_IN_A_PROCESS = """
import os, sys
from pathlib import Path
from spectrumkv.common.model.cache import build_once
build_once(Path(sys.argv[1]), lambda partial: (partial / str(os.getpid())).touch())
"""


def test_the_environment_names_the_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPECTRUMKV_CACHE", str(tmp_path))
    assert cache_directory() == tmp_path
    monkeypatch.setenv("SPECTRUMKV_CACHE", "~/elsewhere")
    assert cache_directory() == Path.home() / "elsewhere"
    monkeypatch.delenv("SPECTRUMKV_CACHE")
    assert cache_directory() == platformdirs.user_cache_path("spectrumkv")


def test_builds_what_is_missing_and_keeps_what_is_there(tmp_path: Path) -> None:
    directory = tmp_path / "deep" / "model-0.1.2"
    assert build_once(directory, lambda partial: (partial / "first").touch()) == directory
    build_once(directory, lambda partial: (partial / "second").touch())
    assert [file.name for file in directory.iterdir()] == ["first"]


def test_the_final_name_appears_only_with_the_complete_result(tmp_path: Path) -> None:
    directory = tmp_path / "model"

    def build(partial: Path) -> None:
        (partial / "weights").touch()
        assert not directory.exists()

    build_once(directory, build)
    assert (directory / "weights").exists()


def test_threads_that_ask_together_build_once(tmp_path: Path) -> None:
    together, builds = threading.Barrier(8), []

    def ask(_: int) -> Path:
        together.wait()
        return build_once(tmp_path / "model", lambda partial: builds.append(partial))

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ask, range(8))) == {tmp_path / "model"}
    assert len(builds) == 1


def test_processes_that_ask_together_build_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", BUILD_IN_A_PROCESS, str(tmp_path / "model")]
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    builders = [int(file.name) for file in (tmp_path / "model").iterdir()]
    assert len(builders) == 1
    assert builders[0] in {process.pid for process in processes}


def test_a_failed_build_leaves_nothing_and_can_be_repeated(tmp_path: Path) -> None:
    def fail(partial: Path) -> None:
        (partial / "half").touch()
        raise FailedPreconditionError("no network")

    with pytest.raises(FailedPreconditionError, match="no network"):
        build_once(tmp_path / "model", fail)
    assert [file.name for file in tmp_path.iterdir() if file.is_dir()] == []
    build_once(tmp_path / "model", lambda partial: (partial / "whole").touch())
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["whole"]


def test_what_a_killed_process_left_is_not_taken_over(tmp_path: Path) -> None:
    left = tmp_path / "model.partial"
    left.mkdir()
    (left / "half").touch()
    build_once(tmp_path / "model", lambda partial: (partial / "whole").touch())
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["whole"]
    assert not left.exists()


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FailedPreconditionError, match=r"cannot write to .*file.*SPECTRUMKV_CACHE"):
        build_once(tmp_path / "file" / "model", lambda partial: None)
