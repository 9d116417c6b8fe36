from pathlib import Path

import pytest

from spectrumkv.common.model.load import LoadedModel, load_model
from tests.tiny_models import ARCHITECTURES, tiny_model


@pytest.fixture(scope="session", params=ARCHITECTURES)
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    """The tiny model of each architecture."""
    return load_model(str(tiny_model(request.param)), "cpu")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory of the test's own."""
    directory = tmp_path / "cache"
    monkeypatch.setenv("SPECTRUMKV_CACHE", str(directory))
    return directory
