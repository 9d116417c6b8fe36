from collections.abc import Iterator
from pathlib import Path

import pytest

from spectrumkv.client.local.pair_config import FREE_PORTS
from spectrumkv.client.local.running_pair import RunningPair, running_pair
from tests.tiny_models import build_tiny_model


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model("llama", tmp_path_factory.mktemp("tiny") / "llama")


def options(model: Path, **more: str) -> dict[str, str]:
    """Options of a pair of processes on free ports that needs no probe."""
    return {"model": str(model), "kv_memory": "64MiB", "int4": "on", **FREE_PORTS, **more}


@pytest.fixture
def process_pair(tiny_llama: Path) -> Iterator[RunningPair]:
    """Both services as processes of their own."""
    with running_pair(options(tiny_llama)) as pair:
        yield pair
