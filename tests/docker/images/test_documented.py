"""The commands and files of docs/operations.md and docs/security.md are taken by Compose as they are written."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.docker.deployment import DOCKER, OPERATIONS, ROOT

TEXTS = [OPERATIONS.read_text(), (ROOT / "docs" / "security.md").read_text()]
SHELL = [block for text in TEXTS for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)]
# A command of several lines is one; comments end it.
COMMANDS = [
    line.split("  #")[0]
    for block in SHELL
    for line in block.replace("\\\n", " ").splitlines()
    if re.search(r"\bdocker compose\b.*\bup\b", line)
]
FILES = dict(re.findall(r"In `(docker/compose\.[\w.-]+\.yaml)`:\n\n```yaml\n(.*?)```", "\n".join(TEXTS), re.DOTALL))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The deployment's files with those that the documents have readers write."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(DOCKER, folder / "docker")
    shutil.copy(ROOT / "compose.yaml", folder)
    for name, content in FILES.items():
        (folder / name).write_text(content)
    return folder


def configured(checkout: Path, command: str) -> str:
    """What Compose makes of a command's files and variables; it must not warn."""
    shown = re.sub(r"\bup\b.*", "config", command)
    done = subprocess.run(
        ["bash", "-c", shown], cwd=checkout, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, ""), shown
    return done.stdout


def test_the_documents_show_commands_and_files() -> None:
    assert len(COMMANDS) >= 6
    assert len(FILES) >= 2


@pytest.mark.parametrize("command", COMMANDS)
def test_a_documented_command_is_taken_without_a_warning(checkout: Path, command: str) -> None:
    assert "spectrumkv-decode" in configured(checkout, command)


def test_the_second_worker_has_the_name_of_the_first_and_a_gpu_of_its_own(checkout: Path) -> None:
    (command,) = [one for one in COMMANDS if "decode-2" in one]
    second = configured(checkout, command).split("\n  decode-2:\n")[1].split("\n  gateway:\n")[0]
    assert re.search(r"aliases:\n\s+- decode\n", second)
    assert re.findall(r'device_ids:\n\s+- "(\d+)"\n', second) == ["2"]
