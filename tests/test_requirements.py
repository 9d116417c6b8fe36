"""The locked dependencies are those that pyproject.toml asks for."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from spectrumkv.common.model.embedded import WHEEL

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "requirements"
FILES = tuple(path.name for path in sorted(FOLDER.glob("*.txt")))


def locked(name: str) -> dict[str, list[str]]:
    """Versions of each package in a file; one that depends on Python's version has several."""
    versions: dict[str, list[str]] = {}
    for package, version in re.findall(r"^([\w.-]+)(?:\[[\w,-]+\])?==([\w.+]+)", (FOLDER / name).read_text(), re.M):
        versions.setdefault(package.lower().replace("_", "-"), []).append(version)
    return versions


@pytest.mark.parametrize("torch", ["torch-cpu.txt", "torch-cuda.txt"])
def test_every_dependency_is_locked_at_a_version_that_is_allowed(torch: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    named = [*project["dependencies"], *(one for group in extras.values() for one in group)]
    wanted = [Requirement(one) for one in named]
    versions = locked("locked.txt") | locked("triton.txt") | locked(torch)
    for requirement in wanted:
        if requirement.name == "spectrumkv":
            continue
        found = versions.get(requirement.name.lower().replace("_", "-"), [])
        assert found, f"{requirement} is not locked; run `make lock`"
        for version in found:
            assert requirement.specifier.contains(version), f"{requirement} is locked at {version}; run `make lock`"


def test_images_have_what_the_services_ask_for_at_the_versions_that_tests_ran_with() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [Requirement(one) for one in (*project["dependencies"], *extras["otel"], *extras["gateway"])]
    image, tested = locked("image.txt"), locked("locked.txt")
    assert {one.name.replace("_", "-") for one in wanted} - image.keys() == {"torch"}
    assert {name: versions for name, versions in image.items() if tested.get(name) != versions} == {}
    assert "triton" not in image


def test_the_baked_model_is_the_one_that_services_ask_for() -> None:
    assert locked("embedded-model.txt") == {WHEEL.package: [WHEEL.version]}
    assert f"--hash=sha256:{WHEEL.sha256}" in (FOLDER / "embedded-model.txt").read_text()


@pytest.mark.parametrize("name", FILES)
def test_every_file_of_a_locked_package_is_pinned_by_its_hash(name: str) -> None:
    entries = re.split(r"^(?=[\w.-]+(?:\[[\w,-]+\])?==)", (FOLDER / name).read_text(), flags=re.M)[1:]
    assert entries
    assert [entry.splitlines()[0] for entry in entries if "--hash=sha256:" not in entry] == []


@pytest.mark.parametrize(
    ("printed", "says", "status"),
    [
        ("", "skipped: pip-audit could not ask its database", 0),
        ('{"dependencies": [{"name": "a", "skip_reason": "x"}]}', "skipped: the vulnerability database answered", 0),
        ('{"dependencies": [{"name": "a", "version": "1", "vulns": []}]}', "1 of 1 packages looked up, 0 with", 0),
        ('{"dependencies": [{"name": "a", "version": "1", "vulns": [{"id": "CVE-1"}]}]}', "a 1: CVE-1", 1),
    ],
)
def test_an_audit_that_looked_nothing_up_does_not_pass_for_a_clean_one(
    tmp_path: Path, printed: str, says: str, status: int
) -> None:
    """The script is run with a stand-in for pip-audit that prints what it would."""
    (tmp_path / "pip_audit.py").write_text(f"print({printed!r})")
    done = subprocess.run(
        [sys.executable, str(FOLDER / "audit.py")],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (says in done.stdout, done.returncode) == (True, status), done.stdout + done.stderr


# In the place of uv: answers as it does where all can be had, and then as a test wants it to.
UV = """
import pathlib, sys
if "compile" in sys.argv:
    for name in ("locked", "triton", "torch-cpu" if "--extra-index-url" in sys.argv else "torch-cuda"):
        print(pathlib.Path("requirements", name + ".txt").read_text())
{then}
"""


@pytest.mark.parametrize(
    ("then", "says", "status"),
    [
        ("", "LOCKED=1: can be installed from requirements/locked.txt, requirements/triton.txt", 0),
        ("sys.exit('error sending request: dns error')", "LOCKED=1: skipped: the index cannot be reached: error", 0),
        ("sys.exit('no trusted hash was provided for: `x`')", "LOCKED=1: no trusted hash was provided for: `x`", 1),
        ("print('some-package==1.0 --hash=sha256:' + 64 * '0')", "LOCKED=1: some-package==1.0 is not locked", 1),
        ("print('triton==3.7.1 --hash=sha256:' + 64 * '0')", "triton==3.7.1 has no file on the index with a hash", 1),
    ],
)
def test_a_locked_set_that_cannot_be_installed_is_told(tmp_path: Path, then: str, says: str, status: int) -> None:
    (tmp_path / "uv.py").write_text(UV.format(then=then))
    done = subprocess.run(
        [sys.executable, str(FOLDER / "check.py")],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (says in done.stdout, done.returncode) == (True, status), done.stdout + done.stderr
