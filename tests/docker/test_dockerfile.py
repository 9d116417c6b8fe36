import json
import re
import subprocess
import sys
import tomllib
from typing import Any

import pytest

from spectrumkv.client import health
from tests.docker.deployment import COMPOSE_FILES, DOCKER, ROOT, SERVICES, interpolate, read_compose

Instruction = tuple[str, str]


def stages() -> dict[str, list[Instruction]]:
    """Instructions of the Dockerfile by stage."""
    text = re.sub(r"^\s*#.*\n", "", (DOCKER / "Dockerfile").read_text(), flags=re.MULTILINE)
    found: dict[str, list[Instruction]] = {}
    stage = ""
    for line in text.replace("\\\n", " ").splitlines():
        if not line.strip():
            continue
        name, rest = line.split(maxsplit=1)
        if name == "FROM":
            stage = rest.split()[-1]
        found.setdefault(stage, []).append((name, rest))
    return found


def arguments(stage: str, name: str) -> list[str]:
    return [rest for instruction, rest in stages()[stage] if instruction == name]


def project() -> Any:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("file", COMPOSE_FILES)
@pytest.mark.parametrize("service", SERVICES)
def test_compose_builds_a_stage_that_exists(file: str, service: str) -> None:
    build = read_compose(COMPOSE_FILES[file])["services"][service]["build"]
    assert build["target"] in stages()
    for argument in build.get("args", {}):
        assert any(f"{argument}=" in rest for stage in stages() for rest in arguments(stage, "ARG"))


@pytest.mark.parametrize("stage", ["cpu", "gpu"])
def test_images_end_as_a_numbered_user_that_is_not_root(stage: str) -> None:
    uid, group = arguments(stage, "USER")[-1].split(":")
    assert uid.isdigit()
    assert int(uid) > 0
    assert f"useradd --uid {uid} --gid {group} " in " ".join(arguments("base", "RUN"))


def test_everything_is_installed_from_locked_files() -> None:
    for stage, instructions in stages().items():
        for name, rest in instructions:
            for command in re.findall(r"\bpip (?:install|download) [^&]*", rest if name == "RUN" else ""):
                assert "--require-hashes --no-deps" in command or "--no-index --no-deps" in command, stage
                for file in re.findall(r"/requirements/([\w-]+\.txt)", command):
                    assert (ROOT / "requirements" / file).is_file()


def test_the_labels_tell_the_version_of_the_package() -> None:
    for stage in ("cpu", "gpu"):
        assert f"VERSION={project()['version']}" in arguments(stage, "ARG")


def test_no_frontend_has_to_be_pulled() -> None:
    assert not (DOCKER / "Dockerfile").read_text().startswith("# syntax")


def test_only_the_gpu_image_has_a_compiler() -> None:
    assert "gcc" not in " ".join(arguments("base", "RUN") + arguments("cpu", "RUN"))
    # Triton compiles its launchers with it, against libc's headers.
    assert {"gcc", "libc6-dev"} <= set(" ".join(arguments("gpu", "RUN")).split())


def test_signals_reach_the_service() -> None:
    (entry,) = arguments("base", "ENTRYPOINT")
    tini, _, shell, _, script, _ = json.loads(entry)
    # The shell sets who may use the cache, and gives way to the service.
    assert (tini, shell, script) == ("tini", "sh", 'umask 0002 && exec "$@"')
    (default,) = arguments("base", "CMD")
    assert json.loads(default)[0] in project()["scripts"]


def test_the_health_check_is_a_command_that_the_client_has() -> None:
    (check,) = arguments("base", "HEALTHCHECK")
    (environment,) = arguments("base", "ENV")
    assert json.loads(check.split(" CMD ")[1]) == ["spectrumkv-health"]
    assert project()["scripts"]["spectrumkv-health"] == f"{health.__name__}:{health.main.__name__}"
    assert f"{health.SERVER_VARIABLE}=127.0.0.1:50051" in environment.split()


def test_all_that_is_written_lies_in_the_cache_volume() -> None:
    (environment,) = arguments("base", "ENV")
    variables = dict(word.split("=", 1) for word in environment.split())
    compose = read_compose(COMPOSE_FILES["gpu"])
    for service in SERVICES:
        (volume,) = compose["services"][service]["volumes"]
        root = volume.split(":")[1]
        for name in ("HOME", "SPECTRUMKV_CACHE", "HF_HOME", "TRITON_CACHE_DIR"):
            assert variables[name].startswith(root)


def packaged_folders() -> set[str]:
    """The top-level folders that the wheel is built from, as setup.py finds them."""
    code = "import sys; sys.argv[1:] = ['--version']; import setup; print(*setup.package_directories().values())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return {folder.split("/")[0] for folder in done.stdout.splitlines()[-1].split()}


def test_the_build_context_holds_what_the_wheel_needs_and_starts_from_nothing() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"
    needed = packaged_folders() | {"pyproject.toml", "setup.py", "LICENSE", "README.md", "requirements/*.txt"}
    assert {line[1:] for line in lines if line.startswith("!")} == needed


def test_the_build_context_is_the_repository() -> None:
    compose = read_compose(COMPOSE_FILES["gpu"])
    build = compose["services"]["prefill"]["build"]
    assert (DOCKER / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]).is_file()
    assert interpolate(compose["services"]["prefill"]["image"], {}) == "spectrumkv:gpu"
