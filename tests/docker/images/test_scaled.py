"""Replicas of decode come and go under load: each gets its share, and no request notices."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docker.images.engine import Project, metric, wait_for
from tests.docker.images.load import Load

# A replica is found by its name within these seconds of being ready.
FOUND_SECONDS = 10.0
LEAST_SHARE = 0.2
REQUESTS = 90


@pytest.fixture
def project(cpu_image: str, model: Path) -> Iterator[Project]:
    environment = {"MODEL": "/model", "TEST_MODEL": str(model), "KV_MEMORY": "64MiB"}
    with Project("spectrumkv-test-scaled", ("compose.yaml", "compose.cpu.yaml"), environment) as started:
        started.up("prefill", "decode")
        yield started


def admitted(project: Project) -> dict[str, float]:
    """How many requests each replica of decode has ended without an error."""
    found = {}
    for container in project.containers("decode"):
        found[container] = metric(container, 9465, "spectrumkv_requests_total")
    return found


def test_decode_goes_from_one_to_three_to_two_under_load(project: Project) -> None:
    with Load(project.published("prefill", 50051), threads=6) as load:
        wait_for(lambda: len(load.sent) >= 6, "requests are answered", 120)
        # Compose returns when the new replicas are healthy, and then they are soon given requests.
        project.compose("up", "--no-build", "--no-recreate", "--detach", "--wait", "--scale", "decode=3", "decode")
        took = wait_for(lambda: min(admitted(project).values()) > 0, "each replica has a request", FOUND_SECONDS)
        before, sent = admitted(project), len(load.sent)
        assert len(before) == 3
        wait_for(lambda: len(load.sent) >= sent + REQUESTS, f"{REQUESTS} requests are answered", 300)
        after = admitted(project)
        gained = {container: after[container] - before[container] for container in before}
        shares = {container[:12]: round(count / sum(gained.values()), 3) for container, count in gained.items()}
        print(f"found within {took:.1f} s; shares of {sum(gained.values()):.0f} requests: {shares}")
        project.compose("up", "--no-build", "--no-recreate", "--detach", "--scale", "decode=2", "decode")
        sent = len(load.sent)
        wait_for(lambda: len(load.sent) >= sent + 30, "requests go on", 120)
        assert len(project.containers("decode")) == 2
    print(f"{len(load.sent)} requests, {len(load.errors)} errors")
    assert load.errors == []
    assert min(shares.values()) >= LEAST_SHARE
