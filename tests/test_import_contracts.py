"""The contracts on imports that `make lint` holds do refuse what they forbid."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOP_LEVEL = ("bench", "client", "common", "decode_server", "gateway", "kernels", "prefill_server", "vllm_plugin")
LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(sys.argv[1], no_cache=True))"


def lint_with(folder: Path, place: str, line: str) -> "subprocess.CompletedProcess[str]":
    """Check the contracts over a copy of the packages in which the module `place` has one more line."""
    packages = folder / "spectrumkv"
    packages.mkdir()
    for name in TOP_LEVEL:
        shutil.copytree(ROOT / name, packages / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copytree(ROOT / "proto" / "spectrumkv" / "v1", packages / "v1")
    module = packages / place
    module.write_text(f"{module.read_text()}\n{line}\n")
    return subprocess.run(
        [sys.executable, "-c", LINT, str(ROOT / "pyproject.toml")],
        env=os.environ | {"PYTHONPATH": str(folder)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("place", "line", "broken"),
    [
        ("common/kv/wire.py", "import grpc", "common.kv is tensors and bytes"),
        ("kernels/__init__.py", "import spectrumkv.common.errors", "common uses kernels"),
        ("client/completion.py", "import torch", "The client library needs no torch"),
        ("vllm_plugin/register.py", "import numba", "loads neither kernels nor gRPC"),
        (
            "common/kv/codecs/fixed_rate/tiers.py",
            "import spectrumkv.common.kv.codecs.spectral",
            "nothing of each other",
        ),
    ],
)
def test_an_import_that_a_contract_forbids_is_named(tmp_path: Path, place: str, line: str, broken: str) -> None:
    done = lint_with(tmp_path, place, line)
    printed = " ".join(done.stdout.split())
    assert done.returncode == 1, done.stdout + done.stderr
    assert ", 0 broken" not in printed
    assert broken in printed.partition("Broken contracts")[2], printed
    assert line.split()[-1] in printed.partition("Broken contracts")[2]
