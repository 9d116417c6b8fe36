"""Every replica is replaced as Kubernetes replaces pods: a pause before SIGTERM, the grace, one after another."""

import json
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docker.deployment import DOCKER
from tests.docker.images.engine import Project, docker, health, inspect, wait_for

BASE = DOCKER / "kubernetes" / "base"
LEAST_REQUESTS = 300
THREADS = 3


def pod(service: str) -> Any:
    """The pod that the manifests make of a service."""
    documents = yaml.safe_load_all((BASE / f"{service}.yaml").read_text())
    (workload,) = [one for one in documents if one["kind"] in ("StatefulSet", "Deployment")]
    return workload["spec"]["template"]["spec"]


@pytest.fixture
def project(cpu_image: str, model: Path) -> Iterator[Project]:
    grace = tomllib.loads((BASE / "decode.toml").read_text())["grace"]
    environment = {"MODEL": "/model", "TEST_MODEL": str(model), "KV_MEMORY": "64MiB", "GRACE": str(grace)}
    with Project("spectrumkv-test-rolled", ("compose.yaml", "compose.cpu.yaml"), environment) as started:
        started.up("--scale", "prefill=2", "--scale", "decode=2", "prefill", "decode")
        yield started


def replace(project: Project, service: str) -> None:
    """Replace each replica of a service by a new one, once the one before it is ready."""
    (container_of_pod,) = pod(service)["containers"]
    pause = container_of_pod["lifecycle"]["preStop"]["sleep"]["seconds"]
    left = pod(service)["terminationGracePeriodSeconds"] - pause
    for old in project.containers(service):
        # What the kubelet does of `preStop`: the replica serves on.
        time.sleep(pause)
        docker("stop", "--time", str(left), old, timeout=left + 60)
        assert inspect(old)["State"]["ExitCode"] == 0
        docker("rm", old)
        scale = ("--scale", "prefill=2", "--scale", "decode=2")
        project.compose("up", "--no-build", "--no-recreate", "--detach", *scale, "decode", "prefill")
        now = project.containers(service)
        assert len(now) == 2
        assert old not in now
        wait_for(lambda now=now: {health(one) for one in now} == {"healthy"}, f"{service} is ready again")


def test_a_rolling_restart_fails_no_request(project: Project, cpu_image: str) -> None:
    script = Path(__file__).parent / "asking.py"
    network = f"--network={project.name}_default"
    words = [network, f"--volume={script}:/asking.py:ro", cpu_image, "python", "/asking.py", "prefill:50051"]
    client = docker("run", "--detach", *words, str(THREADS)).strip()
    try:
        for service in ("decode", "prefill"):
            replace(project, service)
        # Long enough for what was asked last.
        docker("stop", "--time", "120", client, timeout=180)
        said = json.loads(docker("logs", client).splitlines()[-1])
    finally:
        docker("rm", "--force", client)
    print(f"{said['answered']} requests answered while 4 replicas were replaced, {len(said['errors'])} failed")
    assert said["errors"] == []
    assert said["tokens"] == [24]
    assert said["answered"] >= LEAST_REQUESTS
