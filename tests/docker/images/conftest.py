import shutil
import subprocess
from pathlib import Path

import pytest

from tests.docker.images.engine import build, why_no_engine
from tests.tiny_models import tiny_model

CPU, BAKED, GPU = "spectrumkv:cpu", "spectrumkv-test:baked", "spectrumkv:gpu"
PROMETHEUS = """
FROM python:3.11-slim-bookworm
RUN apt-get update && apt-get install --yes --no-install-recommends prometheus \\
    && install --directory --owner=65534 /prometheus
USER 65534
ENTRYPOINT ["prometheus"]
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = why_no_engine()
    for item in items:
        if Path(__file__).parent in item.path.parents:
            # Builds, and services that start on processors that others use.
            item.add_marker(pytest.mark.timeout(3600))
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=f"needs a Docker engine: {reason}"))


@pytest.fixture(scope="session")
def cpu_image() -> str:
    build("--target", "cpu", "--tag", CPU)
    return CPU


@pytest.fixture(scope="session")
def baked_image() -> str:
    build("--target", "cpu", "--tag", BAKED, "--build-arg", "EMBEDDED_MODEL=baked")
    return BAKED


@pytest.fixture(scope="session")
def gpu_image() -> str:
    """The GPU image with PyTorch's CPU build, since there is no GPU to use the other one."""
    build("--target", "gpu", "--tag", GPU, "--build-arg", "GPU_TORCH=torch-cpu")
    return GPU


@pytest.fixture(scope="session")
def prometheus_image(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("prometheus")
    (folder / "docker").mkdir()
    (folder / "docker" / "Dockerfile").write_text(PROMETHEUS)
    build("--tag", "spectrumkv-test:prometheus", context=folder)
    return "spectrumkv-test:prometheus"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, where a container's user may read it."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    shutil.copytree(tiny_model("llama"), folder)
    subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
    return folder
