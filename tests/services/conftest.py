from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.services.pair import Pair, running_pair
from tests.tiny_models import ARCHITECTURES, build_tiny_model


@pytest.fixture(scope="session")
def tiny_directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny-models")
    return {name: build_tiny_model(name, root / name) for name in ARCHITECTURES}


@pytest.fixture(scope="session", params=ARCHITECTURES)
def tiny_pair(request: pytest.FixtureRequest, tiny_directories: dict[str, Path]) -> Iterator[Pair]:
    """Both services on a small random-weight model of each architecture."""
    with running_pair(tiny_directories[request.param], decode={"kv_memory": "64MiB"}) as pair:
        yield pair


@pytest.fixture(scope="session")
def llama_pair(tiny_directories: dict[str, Path]) -> Iterator[Pair]:
    """Both services on one small model, for what does not depend on the architecture."""
    with running_pair(tiny_directories["llama"], decode={"kv_memory": "64MiB"}) as pair:
        yield pair
