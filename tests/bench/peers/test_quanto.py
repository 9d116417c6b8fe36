"""quanto's extension: a lock that nobody holds is named and not waited for, and compiling is said beforehand."""

import os
import threading
import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from spectrumkv.bench.main import main
from spectrumkv.bench.peers import quanto
from spectrumkv.bench.peers.quanto import expect_extension
from spectrumkv.common.errors import FailedPreconditionError
from tests.bench.conftest import TEXT
from tests.tiny_models import tiny_model

extension_module = pytest.importorskip("optimum.quanto.library.extensions.extension")

NOTICE = "quanto compiles its kernels at first use, which takes a minute\n"


@pytest.fixture
def extension(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An extension of quanto's for CPUs, not built, in a folder of its own."""
    (tmp_path / "nothing.cpp").write_text("")
    made = extension_module.Extension("quanto_cpp", root_dir=str(tmp_path), sources=["nothing.cpp"])
    monkeypatch.setitem(extension_module._extensions, "quanto_cpp", made)
    monkeypatch.setattr(quanto, "LOADING_SECONDS", 0.1)
    return made


def built_with(extension: Any, version: str) -> None:
    folder = Path(extension.build_directory)
    folder.mkdir()
    (folder / "pytorch_version.txt").write_text(version)


def locked(extension: Any) -> Path:
    lock = Path(extension.build_directory) / "lock"
    lock.parent.mkdir(exist_ok=True)
    lock.touch()
    return lock


def said(device: str = "cpu") -> str:
    written = StringIO()
    expect_extension(torch.device(device), Console(file=written))
    return written.getvalue()


class WaitedError(Exception):
    """torch waits for the lock."""


def waits(extension: Any, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether loading the extension would wait; it is neither compiled nor loaded."""

    def refuse(seconds: float) -> None:
        raise WaitedError

    def load_nothing(*arguments: Any) -> None:
        pass

    with monkeypatch.context() as patched:
        patched.setattr("torch.utils.file_baton.time.sleep", refuse)
        patched.setattr("torch.utils.cpp_extension._write_ninja_file_and_build_library", lambda **options: None)
        patched.setattr("torch.utils.cpp_extension._import_module_from_library", load_nothing)
        try:
            # Reading it loads it.
            assert extension.lib is None
        except WaitedError:
            return True
    return False


def test_compiling_is_said_where_nothing_is_built(extension: Any) -> None:
    assert said() == NOTICE
    built_with(extension, torch.__version__)
    assert said() == ""


def test_a_lock_is_named_where_torch_would_wait(extension: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in (None, torch.__version__):
        if version is not None:
            Path(extension.build_directory, "pytorch_version.txt").write_text(version)
        lock = locked(extension)
        assert waits(extension, monkeypatch)
        with pytest.raises(FailedPreconditionError) as refused:
            expect_extension(torch.device("cpu"), Console(file=StringIO()))
        assert refused.value.message.startswith(f"{lock} is there: another process is compiling")
        # Who made it is not known.
        assert lock.exists()
        lock.unlink()
        said()


def test_a_lock_in_a_build_for_another_torch_is_no_obstacle(extension: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    built_with(extension, "1.0.0")
    lock = locked(extension)
    assert said() == NOTICE
    with pytest.warns(UserWarning, match=r"compiled with pytorch 1\.0\.0"):
        assert not waits(extension, monkeypatch)
    assert not lock.exists()


def test_who_only_loads_is_waited_for(extension: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quanto, "LOADING_SECONDS", 60.0)
    built_with(extension, torch.__version__)
    lock = locked(extension)
    timer = threading.Timer(0.2, lock.unlink)
    timer.start()
    began = time.monotonic()
    assert said() == ""
    assert time.monotonic() - began < 30
    timer.join()


def test_a_gpu_has_an_extension_of_its_own(extension: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    locked(extension)
    for name in ("quanto_cuda", "quanto_hip"):
        monkeypatch.delitem(extension_module._extensions, name, raising=False)
    assert said("cuda") == ""
    for name in ("quanto_hip", "quanto_cuda"):
        root = Path(extension.build_directory).parent / name
        root.mkdir()
        other = extension_module.Extension(name, root_dir=str(root), sources=[])
        monkeypatch.setitem(extension_module._extensions, name, other)
        assert said("cuda") == NOTICE
        lock = locked(other)
        with pytest.raises(FailedPreconditionError, match=str(lock)):
            said("cuda")
        lock.unlink()


@pytest.mark.parametrize("command", ["codec", "quality", "niah"])
def test_the_benches_do_not_wait(
    extension: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    lock = locked(extension)
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    peers = ["--model", str(tiny_model("llama")), "--policies", "fp16,quanto-2bit"]
    arguments = {
        "codec": ["--rounds", "1", "--tokens", "64", "--layers", "2"],
        "quality": ["--text", str(text), "--context", "64", "--scored", "8", "--windows", "1", *peers],
        "niah": ["--context", "128", *peers],
    }[command]
    assert main([command, "--device", "cpu", *arguments]) == 1
    error = capsys.readouterr().err
    assert f"FAILED_PRECONDITION: {lock} is there" in error
    assert error.count("\n") == 1


def test_what_uses_no_quanto_heeds_no_lock(
    extension: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    locked(extension)
    common = ("--device", "cpu", "--model", str(tiny_model("llama")), "--int4", "on", "--json", os.devnull)
    niah = ("niah", "--context", "128", "--depths", "1", "--needles", "1", "--policies", "uniform-int8")
    coding = ("coding", "--tokens", "128", "--rounds", "1", "--policies", "uniform-int8,quanto-4bit")
    for command in (niah, coding):
        assert main([*command, *common]) == 0
        assert NOTICE not in capsys.readouterr().err
