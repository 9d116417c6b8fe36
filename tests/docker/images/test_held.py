"""Containers that are held to a user, to a root that cannot be written, to memory and to processors."""

import re
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docker.images.engine import READ_ONLY, docker, docker_logs, health, inspect, run, wait_for

CACHE = "/var/cache/spectrumkv"
DECODE = ["spectrumkv-decode", "--model=/model", "--device=cpu", "--kv-memory=64MiB"]


@pytest.fixture
def volume() -> Iterator[str]:
    name = f"spectrumkv-test-{uuid.uuid4().hex}"
    docker("volume", "create", name)
    yield name
    docker("volume", "rm", "--force", name)


def served(image: str, model: Path, *words: str) -> str:
    """Start decode in a container, wait until its health check finds it ready, stop it, and return its log."""
    server = ["--env=SPECTRUMKV_SERVER=127.0.0.1:50052", "--health-interval=1s"]
    mounts = [f"--volume={model}:/model:ro", *server]
    container = docker("run", "--detach", *mounts, *READ_ONLY, *words, image, *DECODE).strip()
    try:
        wait_for(lambda: health(container) in ("healthy", ""), f"{container} is healthy")
        docker("stop", container)
        log = docker_logs(container)
        assert inspect(container)["State"]["ExitCode"] == 0, log
        return log
    finally:
        docker("rm", "--force", container)


def test_any_user_of_group_0_serves_from_a_cache_that_the_next_one_can_use(
    cpu_image: str, model: Path, volume: str
) -> None:
    cache = f"--volume={volume}:{CACHE}"
    for user in ("54321:0", "10001:0", "54322:0"):
        log = served(cpu_image, model, cache, f"--user={user}")
        assert "cannot" not in log, log
    files = run(cache, "--user=10001:0", cpu_image, "find", CACHE, "-type", "f").output.splitlines()
    assert [name for name in files if "/compiled/" in name]
    assert [name for name in files if Path(name).name.startswith((".bash", ".profile"))] == []
    kept_from_others = run(cache, "--user=10001:0", cpu_image, "find", CACHE, "!", "-perm", "-g=r").output
    assert kept_from_others == ""


def test_limits_are_heeded_and_logged(cpu_image: str, model: Path) -> None:
    log = served(cpu_image, model, "--memory=3g", "--cpus=1")
    assert "torch runs 1 threads; this process may use 1 processors and 3.00 GiB of memory" in log


@pytest.mark.parametrize(
    ("limits", "option", "sentence"),
    [
        (
            ["--memory=3g"],
            "--kv-memory=3GiB",
            r"--kv-memory is 3221225472 bytes, .* has 3221225472, .* leave \d+;",
        ),
        (
            ["--memory=3g"],
            "--kv-memory=2900MiB",
            r"--kv-memory is 3040870400 bytes, .* leave \d+; set it",
        ),
        (["--cpus=1"], "--threads=2", r"--threads is 2, .* keep 1 processors busy; set it lower"),
    ],
)
def test_more_than_the_container_has_is_refused_in_a_sentence(
    cpu_image: str, model: Path, limits: list[str], option: str, sentence: str
) -> None:
    ended = run(*limits, f"--volume={model}:/model:ro", cpu_image, *DECODE, option)
    assert ended.status == 1
    assert re.search(sentence, ended.output.splitlines()[-1]), ended.output


def test_the_gpu_image_serves_on_a_cpu_too(gpu_image: str, model: Path) -> None:
    assert "serving on" in served(gpu_image, model)
