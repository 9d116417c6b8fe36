"""`spectrumkv basis`: what one machine exports, another one imports and uses."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from spectrumkv.client.cli.main import main
from spectrumkv.common.kv.codecs.calibrated.basis import CalibratedBasis
from spectrumkv.common.model.load import load_model
from spectrumkv.prefill_server.tuning.basis_cache import resolve_basis
from tests.tiny_models import tiny_model


@pytest.fixture(scope="module")
def model() -> str:
    return str(tiny_model("llama"))


@pytest.fixture(scope="module")
def found(model: str) -> CalibratedBasis:
    return resolve_basis(load_model(model, "cpu", "auto"), lambda done: None)


@pytest.fixture
def another_machine(found: CalibratedBasis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory, after `found` was found in the usual one."""
    monkeypatch.setenv("SPECTRUMKV_CACHE", str(tmp_path / "cache"))
    return tmp_path


def kept(model: str) -> CalibratedBasis:
    return resolve_basis(load_model(model, "cpu", "auto"), lambda _: pytest.fail("the model is calibrated"))


def test_what_is_exported_here_is_used_where_it_is_imported(
    model: str,
    found: CalibratedBasis,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = str(tmp_path / "basis.safetensors")
    assert main(["basis", "export", file, "--model", model]) == 0
    assert f"wrote basis {found.digest.hex()}" in capsys.readouterr().out
    monkeypatch.setenv("SPECTRUMKV_CACHE", str(tmp_path / "cache"))
    assert main(["basis", "import", file, "--model", model]) == 0
    assert f"kept basis {found.digest.hex()}" in capsys.readouterr().out
    assert kept(model).digest == found.digest


def test_an_imported_basis_takes_the_place_of_the_one_found_here(
    model: str, found: CalibratedBasis, another_machine: Path
) -> None:
    theirs = replace(found, mean=found.mean + 1e-6)
    for basis in (found, theirs):
        (another_machine / "basis").write_bytes(basis.serialized)
        assert main(["basis", "import", str(another_machine / "basis"), "--model", model]) == 0
        assert kept(model).digest == basis.digest


@pytest.mark.parametrize("harm", ["no basis", "other model", "other rotation", "no inverse", "no file"])
def test_what_is_no_basis_of_the_model_is_refused(
    harm: str, model: str, found: CalibratedBasis, another_machine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    singular = found.analysis.clone()
    singular[-1, -1, -1, :, 0] = 0
    contents = {
        "no basis": (b"nonsense", "no calibrated basis"),
        "other model": (replace(found, **first_layers(found, 1)).serialized, "the model has"),
        "other rotation": (
            replace(found, rope_frequencies=found.rope_frequencies * 1.01).serialized,
            "other rotary frequencies",
        ),
        "no inverse": (replace(found, analysis=singular).serialized, "cannot be undone"),
        "no file": (None, "cannot be read: No such file"),
    }
    data, sentence = contents[harm]
    file = another_machine / "basis"
    if data is not None:
        file.write_bytes(data)
    assert main(["basis", "import", str(file), "--model", model]) == 1
    error = capsys.readouterr().err
    assert error.startswith("INVALID_ARGUMENT: ")
    assert sentence in error
    assert not list((another_machine / "cache").glob("bases/*/basis.safetensors"))


def first_layers(basis: CalibratedBasis, layers: int) -> dict[str, torch.Tensor]:
    names = ("mean", "analysis", "std", "attention_exponent", "rope_frequencies", "rope_scaling")
    return {name: getattr(basis, name)[:layers] for name in names}


def test_a_file_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["basis", "export", str(tmp_path / "nowhere" / "basis"), "--model", "/does/not/exist"]) == 1
    assert "FILE" in capsys.readouterr().err
