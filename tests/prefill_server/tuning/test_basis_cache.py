"""A model is calibrated once, or at each start where nothing can be kept."""

from pathlib import Path
from typing import Any

import pytest

from spectrumkv.common.errors import FailedPreconditionError
from spectrumkv.common.kv.codecs.calibrated.basis import CalibratedBasis
from spectrumkv.common.model import cache
from spectrumkv.common.model.load import LoadedModel, load_model
from spectrumkv.prefill_server.tuning import basis_cache
from spectrumkv.prefill_server.tuning.basis_cache import keep_basis, resolve_basis
from tests.tiny_models import tiny_model


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(str(tiny_model("llama")), "cpu")


@pytest.fixture(scope="module")
def basis(loaded: LoadedModel) -> CalibratedBasis:
    return resolve_basis(loaded, lambda done: None)


@pytest.fixture
def calibrations(monkeypatch: pytest.MonkeyPatch, basis: CalibratedBasis) -> list[Any]:
    """The models that are calibrated, which takes no time."""
    models: list[Any] = []

    def calibrate(loaded: LoadedModel, *_: object) -> CalibratedBasis:
        models.append(loaded)
        return basis

    monkeypatch.setattr(basis_cache, "calibrate", calibrate)
    return models


def no_directory(folder: Path) -> Path:
    """A place that even root cannot write to."""
    (folder / "file").touch()
    return folder / "file" / "cache"


def test_the_basis_is_kept_for_the_next_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, loaded: LoadedModel, calibrations: list[Any], caplog: Any
) -> None:
    monkeypatch.setenv("SPECTRUMKV_CACHE", str(tmp_path))
    first, second = (resolve_basis(loaded, lambda done: None) for _ in range(2))
    assert first.digest == second.digest
    assert len(calibrations) == 1
    assert caplog.text == ""


@pytest.mark.parametrize("name", [basis_cache.BASIS_FILE, basis_cache.DIGEST_FILE])
def test_a_vast_file_in_the_place_of_a_kept_one_is_not_read(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    loaded: LoadedModel,
    calibrations: list[Any],
    caplog: Any,
    name: str,
) -> None:
    monkeypatch.setenv("SPECTRUMKV_CACHE", str(tmp_path))
    expected = resolve_basis(loaded, lambda done: None).digest
    (kept,) = (tmp_path / "bases").rglob(name)
    with kept.open("r+b") as file:
        file.truncate(40 << 30)
    assert resolve_basis(loaded, lambda done: None).digest == expected
    assert f"it has {40 << 30} bytes, more than " in caplog.text
    assert len(calibrations) == 2
    caplog.clear()
    assert resolve_basis(loaded, lambda done: None).digest == expected
    assert caplog.text == ""


def test_without_a_place_the_basis_is_kept_in_memory_and_one_warning_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, loaded: LoadedModel, calibrations: list[Any], caplog: Any
) -> None:
    monkeypatch.setenv("SPECTRUMKV_CACHE", str(no_directory(tmp_path)))
    assert resolve_basis(loaded, lambda done: None).digest
    assert len(calibrations) == 1
    (warning,) = caplog.records
    assert "cannot write to" in warning.getMessage()
    assert "SPECTRUMKV_CACHE" in warning.getMessage()
    assert "each start calibrates the model again" in warning.getMessage()


def test_a_disk_that_is_full_once_the_model_is_calibrated_costs_no_second_calibration(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, loaded: LoadedModel, calibrations: list[Any], caplog: Any
) -> None:
    monkeypatch.setenv("SPECTRUMKV_CACHE", str(tmp_path))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "replace", full)
    assert resolve_basis(loaded, lambda done: None).digest
    assert len(calibrations) == 1
    assert len(caplog.records) == 1


def test_a_basis_that_is_imported_needs_a_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, loaded: LoadedModel, basis: CalibratedBasis
) -> None:
    monkeypatch.setenv("SPECTRUMKV_CACHE", str(no_directory(tmp_path)))
    with pytest.raises(FailedPreconditionError, match="cannot write to"):
        keep_basis(loaded, basis)


def test_one_basis_serves_a_model_in_every_dtype(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, calibrations: list[Any]
) -> None:
    monkeypatch.setenv("SPECTRUMKV_CACHE", str(tmp_path))
    for dtype in ("float32", "bfloat16"):
        resolve_basis(load_model(str(tiny_model("llama")), "cpu", dtype), lambda done: None)
    assert len(calibrations) == 1
