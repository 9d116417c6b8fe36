"""What is in the images, and what a change of source rebuilds."""

import json
import re
import shutil
import subprocess
import time
import tomllib
from pathlib import Path

import pytest

from tests.docker.deployment import ROOT
from tests.docker.images.engine import build, docker, inspect, run
from tests.test_requirements import locked

CPU_BYTES = 1_650_000_000
# Triton, gcc with libc's headers, and PyTorch's own headers: beside its PyTorch the GPU image has nothing else.
GPU_BESIDES_BYTES = 1_200_000_000
# A change of source replaces the layer with the package, and no other.
PACKAGE_LAYER_BYTES = 8_000_000
# What pip itself is, and what the images get beside the locked files.
BESIDES = {"pip", "spectrumkv", "torch"}


def distributions(image: str) -> dict[str, str]:
    """The distributions of Python that an image has, with their versions."""
    printed = run("--entrypoint", "python", image, "-m", "pip", "list", "--format", "json").output
    found = json.loads(printed.splitlines()[0])
    return {one["name"].lower().replace("_", "-"): one["version"] for one in found}


def size(image: str) -> int:
    """The bytes of an image's layers, which a test prints."""
    found = int(inspect(image)["Size"])
    print(f"{image} has {found / 1e9:.3f} GB")
    return found


def test_the_cpu_image_is_small_and_has_nothing_of_a_gpu(cpu_image: str) -> None:
    assert size(cpu_image) <= CPU_BYTES
    found = distributions(cpu_image)
    assert found.keys() & {"triton"} == set()
    assert not [name for name in found if name.startswith(("nvidia-", "cuda-"))]
    assert run("--entrypoint", "pip", cpu_image, "check").status == 0
    assert run("--entrypoint", "sh", cpu_image, "-c", "command -v gcc").status != 0


def test_the_gpu_image_adds_triton_and_what_compiles_its_launchers(cpu_image: str, gpu_image: str) -> None:
    assert size(gpu_image) - size(cpu_image) <= GPU_BESIDES_BYTES


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_images_have_the_locked_distributions_and_no_others(kind: str, request: pytest.FixtureRequest) -> None:
    image = request.getfixturevalue(f"{kind}_image")
    wanted = locked("image.txt") | (locked("triton.txt") if kind == "gpu" else {})
    found = distributions(image)
    assert found.keys() - wanted.keys() == BESIDES
    assert {name: version for name, version in found.items() if version not in wanted.get(name, [version])} == {}
    assert found["torch"].split("+")[0] in locked("torch-cpu.txt")["torch"]


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_labels_and_user(kind: str, request: pytest.FixtureRequest) -> None:
    config = inspect(request.getfixturevalue(f"{kind}_image"))["Config"]
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    labels = {name.removeprefix("org.opencontainers.image."): text for name, text in config["Labels"].items()}
    assert (labels["title"], labels["version"], labels["licenses"]) == ("SpectrumKV", version, "Apache-2.0")
    assert config["User"] == "10001:0"


def test_the_bill_of_materials_has_what_is_installed(cpu_image: str, tmp_path: Path) -> None:
    build("--target", "sbom-cpu", "--output", str(tmp_path))
    document = json.loads((tmp_path / "spectrumkv-cpu.cdx.json").read_text())
    named = {one["name"].lower().replace("_", "-"): one["version"] for one in document["components"]}
    installed = distributions(cpu_image)
    assert document["bomFormat"] == "CycloneDX"
    assert {name: version for name, version in installed.items() if named.get(name) != version} == {}


def test_the_image_has_what_exports_spans(cpu_image: str) -> None:
    environment = ["--env", "OTEL_TRACES_EXPORTER=otlp", "--entrypoint", "python"]
    code = "from spectrumkv.common.telemetry.tracing import set_up_spans; set_up_spans('prefill'); print('set up')"
    ended = run(*environment, cpu_image, "-c", code)
    assert (ended.status, ended.output.splitlines()[:1]) == (0, ["set up"]), ended.output


def test_a_change_of_source_rebuilds_the_packages_layer_alone(cpu_image: str, tmp_path: Path) -> None:
    """The steps that run again use no index: pip is given no network's address in either."""
    copied = tmp_path / "source"
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file():
            (copied / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copied / name)
    changed = copied / "client" / "health.py"
    changed.write_text(changed.read_text() + "# One more line.\n")
    began = time.monotonic()
    log = build("--target", "cpu", "--tag", "spectrumkv-test:changed", context=copied)
    took = time.monotonic() - began
    steps = dict(re.findall(r"^#(\d+) \[([\w-]+ \d+/\d+)\]", log, re.MULTILINE))
    cached = set(re.findall(r"^#(\d+) CACHED", log, re.MULTILINE))
    ran = {name.split()[0] for number, name in steps.items() if number not in cached and "1/" not in name[-4:]}
    before, after = (inspect(image)["RootFS"]["Layers"] for image in (cpu_image, "spectrumkv-test:changed"))
    assert ran <= {"wheel", "cpu"}
    assert before[:-1] == after[:-1]
    assert before[-1] != after[-1]
    sizes = docker("history", "--human=false", "--format", "{{.Size}}", "spectrumkv-test:changed").split()
    replaced = int(next(one for one in sizes if one != "0"))
    print(f"a change of source built {', '.join(sorted(ran))} in {took:.0f} s and replaced {replaced / 1e6:.1f} MB")
    assert replaced <= PACKAGE_LAYER_BYTES
