"""A Docker engine, the project's images, and its compose files on it."""

import json
import os
import shlex
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.docker.deployment import DOCKER, ROOT

# What a build needs to reach its package indexes: "--network host", say.
BUILD_VARIABLE = "IMAGE_BUILD"
TEST_FILE = Path(__file__).parent / "compose.test.yaml"
BUILD_SECONDS, START_SECONDS = 1800.0, 900.0
LOOK_SECONDS = 0.1
# Several projects may run here at once.
ANY_PORT = dict.fromkeys(("PREFILL_PORT", "GATEWAY_PORT", "PROMETHEUS_PORT", "GRAFANA_PORT"), "0")
# What the compose files hold their containers to.
READ_ONLY = ["--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", "--security-opt=no-new-privileges"]


def why_no_engine() -> str | None:
    """Why nothing can be run here; None where an engine with buildx and Compose answers."""
    if shutil.which("docker") is None:
        return "docker is not on PATH"
    for words in (["info"], ["buildx", "version"], ["compose", "version"]):
        done = subprocess.run(["docker", *words], capture_output=True, text=True, check=False, timeout=60)
        if done.returncode:
            return f"docker {' '.join(words)}: {(done.stderr.strip() or 'no answer').splitlines()[0]}"
    return None


def docker(*words: str, timeout: float = 120.0, environment: Mapping[str, str] | None = None) -> str:
    """Run a command and return what it prints; what it says of an error is the failure's text."""
    done = subprocess.run(
        ["docker", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        cwd=ROOT,
        env=os.environ | (environment or {}),
    )
    assert done.returncode == 0, f"docker {' '.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(*words: str, context: Path = ROOT) -> str:
    """Build a target of the Dockerfile of a context, and return the log: a line for each step."""
    options = shlex.split(os.environ.get(BUILD_VARIABLE, ""))
    file = str(context / "docker" / "Dockerfile")
    done = subprocess.run(
        ["docker", "build", "--progress", "plain", "--file", file, *options, *words, str(context)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=BUILD_SECONDS,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def docker_logs(container: str) -> str:
    """What the program of a container has written."""
    done = subprocess.run(
        ["docker", "logs", container], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
    )
    return done.stdout


def inspect(name: str) -> dict[str, Any]:
    """What the engine knows of an image, a container or a volume."""
    (found,) = json.loads(docker("inspect", name))
    return dict(found)


@dataclass(frozen=True)
class Ended:
    """How a container's program ended."""

    status: int
    output: str


def run(*words: str, timeout: float = START_SECONDS) -> Ended:
    """Run a container until its program ends, and remove it."""
    done = subprocess.run(
        ["docker", "run", "--rm", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=timeout,
    )
    return Ended(done.returncode, done.stdout)


def wait_for(condition: Callable[[], bool], what: str, seconds: float = START_SECONDS) -> float:
    """Look until something is true, and return how many seconds that took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"not after {seconds:g} s: {what}"
        time.sleep(LOOK_SECONDS)
    return time.monotonic() - began


@dataclass(frozen=True)
class Project:
    """A compose project of the repository's files; a context manager that removes all that it made.

    Attributes:
        name: of the project.
        files: in docker/, the first one of services.
        environment: values of the files' variables.
    """

    name: str
    files: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)

    def __enter__(self) -> "Project":
        self.compose("down", "--volumes", "--timeout", "5")
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is not None:
            print(self.compose("logs", "--no-color", "--tail", "60"))
        self.compose("down", "--volumes", "--timeout", "5")

    def compose(self, *words: str, timeout: float = START_SECONDS) -> str:
        """Run a command of Compose; its warnings fail the test."""
        files = [f"--file={DOCKER / name}" for name in self.files]
        done = subprocess.run(
            ["docker", "compose", "--project-name", self.name, *files, f"--file={TEST_FILE}", *words],
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
            env=os.environ
            | {"PREFILL_PORT": "0", "GATEWAY_PORT": "0", "PROMETHEUS_PORT": "0", "GRAFANA_PORT": "0"}
            | self.environment,
        )
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
        assert "level=warning" not in done.stderr, done.stderr
        return done.stdout

    def up(self, *words: str) -> None:
        """Start services, and wait until they are healthy."""
        self.compose("up", "--no-build", "--detach", "--wait", *words)

    def containers(self, service: str) -> list[str]:
        """The ids of the containers of a service that run."""
        return self.compose("ps", "--quiet", service).split()

    def published(self, service: str, port: int) -> str:
        """The address of this machine that leads to a port of a service."""
        return self.compose("port", service, str(port)).strip()

    def logs(self, service: str) -> str:
        """What a service has logged."""
        return self.compose("logs", "--no-color", "--no-log-prefix", service)


def health(container: str) -> str:
    """What the health check of a container found last; "" where it does not run."""
    state = inspect(container)["State"]
    return str(state.get("Health", {}).get("Status", "")) if state["Running"] else ""


def container_address(container: str) -> str:
    """The address of a container in its network."""
    (network,) = inspect(container)["NetworkSettings"]["Networks"].values()
    return str(network["IPAddress"])


def metric(container: str, port: int, name: str) -> float:
    """The sum of a metric's series that a container exports."""
    with urllib.request.urlopen(f"http://{container_address(container)}:{port}/metrics", timeout=10) as response:
        families = text_string_to_metric_families(response.read().decode())
        return sum(sample.value for family in families for sample in family.samples if sample.name == name)
