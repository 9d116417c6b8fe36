import logging
import os
import pwd
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import platformdirs
import pytest

from spectrumkv.common.errors import FailedPreconditionError
from spectrumkv.common.model.cache import build_once, cache_directory, read_entry, write_entry
from spectrumkv.kernels.jit.cache import compiled_code_directory

BUILD_IN_A_PROCESS = """
import os, sys
from pathlib import Path
from spectrumkv.common.model.cache import build_once
build_once(Path(sys.argv[1]), "a test's", lambda partial: (partial / str(os.getpid())).touch(), os.fspath)
"""


def built(directory: Path, build: Callable[[Path], None]) -> Path:
    """Build an entry that is never damaged."""
    return build_once(directory, "an entry", build, lambda complete: complete)


def number_in(directory: Path) -> int:
    """Read an entry that holds a number."""
    return int((directory / "number").read_text())


def test_the_environment_names_the_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPECTRUMKV_CACHE", str(tmp_path))
    assert cache_directory() == tmp_path
    monkeypatch.setenv("SPECTRUMKV_CACHE", "~/elsewhere")
    assert cache_directory() == Path.home() / "elsewhere"
    monkeypatch.delenv("SPECTRUMKV_CACHE")
    assert cache_directory() == platformdirs.user_cache_path("spectrumkv")


def test_builds_what_is_missing_and_keeps_what_is_there(tmp_path: Path) -> None:
    directory = tmp_path / "deep" / "model-0.1.2"
    assert built(directory, lambda partial: (partial / "first").touch()) == directory
    built(directory, lambda partial: (partial / "second").touch())
    assert [file.name for file in directory.iterdir()] == ["first"]


def test_the_final_name_appears_only_with_the_complete_result(tmp_path: Path) -> None:
    directory = tmp_path / "model"

    def build(partial: Path) -> None:
        (partial / "weights").touch()
        assert not directory.exists()

    built(directory, build)
    assert (directory / "weights").exists()


def test_threads_that_ask_together_built(tmp_path: Path) -> None:
    together, builds = threading.Barrier(8), []

    def ask(_: int) -> Path:
        together.wait()
        return built(tmp_path / "model", lambda partial: builds.append(partial))

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ask, range(8))) == {tmp_path / "model"}
    assert len(builds) == 1


def test_processes_that_ask_together_built(tmp_path: Path) -> None:
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
        built(tmp_path / "model", fail)
    assert [file.name for file in tmp_path.iterdir() if file.is_dir()] == []
    built(tmp_path / "model", lambda partial: (partial / "whole").touch())
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["whole"]


def test_what_a_killed_process_left_is_not_taken_over(tmp_path: Path) -> None:
    left = tmp_path / "model.partial"
    left.mkdir()
    (left / "half").touch()
    built(tmp_path / "model", lambda partial: (partial / "whole").touch())
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["whole"]
    assert not left.exists()


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FailedPreconditionError, match=r"cannot write to .*file.*SPECTRUMKV_CACHE"):
        built(tmp_path / "file" / "model", lambda partial: None)


def test_a_user_without_home_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    for variable in ("HOME", "XDG_CACHE_HOME", "SPECTRUMKV_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert cache_directory().is_relative_to("/nonexistent")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_users_cache_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    built(tmp_path / "private" / "e", lambda partial: (partial / "whole").touch())
    (tmp_path / "private").chmod(0o700)
    os.seteuid(65534)
    try:
        with pytest.raises(FailedPreconditionError, match=r"cannot write to .*private.*SPECTRUMKV_CACHE"):
            built(tmp_path / "private" / "e", lambda partial: None)
        assert read_entry(tmp_path / "private" / "text", "the text", str) is None
        write_entry(tmp_path / "private" / "text", "the text", "some")
        assert compiled_code_directory(str(tmp_path / "private")) is None
    finally:
        os.seteuid(0)
    assert "cannot use the text" in caplog.text
    assert "cannot keep the text" in caplog.text


def becomes_a_pipe(file: Path) -> None:
    """Nobody will ever write to it."""
    file.unlink()
    os.mkfifo(file)


def becomes_a_device(file: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "damage",
    [lambda file: file.write_text("not a number"), Path.unlink, becomes_a_pipe, becomes_a_device],
    ids=["text", "missing", "pipe", "device"],
)
def test_a_damaged_directory_is_built_again_with_a_warning(
    damage: Callable[[Path], object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def ask(number: str) -> int:
        return build_once(tmp_path / "e", "the number", lambda partial: write(partial / "number", number), number_in)

    assert ask("1") == 1
    assert ask("2") == 1
    assert not caplog.records
    damage(tmp_path / "e" / "number")
    assert ask("3") == 3
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert f"cannot use the number kept in {tmp_path / 'e'}" in caplog.text
    assert ask("4") == 3


def test_a_damaged_directory_stays_where_it_cannot_be_built_again(tmp_path: Path) -> None:
    def fail(partial: Path) -> None:
        raise FailedPreconditionError("no network")

    write(tmp_path / "e" / "number", "damaged")
    with pytest.raises(FailedPreconditionError, match="no network"):
        build_once(tmp_path / "e", "the number", fail, number_in)
    assert (tmp_path / "e" / "number").read_text() == "damaged"


def test_a_file_is_read_as_it_was_written_and_replaced_whole(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "entry"
    assert read_entry(file, "the number", int) is None
    for text in ("1", "2"):
        write_entry(file, "the number", text)
        assert read_entry(file, "the number", int) == int(text)
    assert list(file.parent.iterdir()) == [file]


def test_a_damaged_file_counts_as_none_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_entry(tmp_path / "entry", "the number", "12")
    whole = (tmp_path / "entry").read_bytes()
    write_entry(tmp_path / "entry", "the number", "one")
    for content in (b"", b"12", b"\xff", whole[:-1], whole[:-1] + b"3", (tmp_path / "entry").read_bytes()):
        (tmp_path / "entry").write_bytes(content)
        caplog.clear()
        assert read_entry(tmp_path / "entry", "the number", int) is None
        assert f"cannot use the number kept in {tmp_path / 'entry'}" in caplog.text


def test_a_file_that_cannot_be_kept_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    write_entry(tmp_path / "file" / "entry", "the number", "1")
    assert f"cannot keep the number in {tmp_path / 'file' / 'entry'}" in caplog.text


def write(file: Path, text: str) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664)])
def test_the_umask_says_who_may_read_an_entry(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_entry(tmp_path / "entry", "the number", "1")
    finally:
        os.umask(before)
    assert [file.name for file in tmp_path.iterdir()] == ["entry"]
    assert (tmp_path / "entry").stat().st_mode & 0o777 == mode


def test_another_user_of_the_group_can_wait_for_an_entry(tmp_path: Path) -> None:
    built(tmp_path / "model", lambda partial: None)
    assert (tmp_path / "model.lock").stat().st_mode & 0o060 == 0o060
