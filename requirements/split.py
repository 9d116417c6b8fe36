"""Splits what `uv pip compile` found into the files that `make install LOCKED=…` and images read; `make lock` does.

PyTorch is published twice: on PyPI for CUDA, with several gigabytes of libraries behind it, and on its own index for
CPUs, without them. So each has a file of its own, and what both need stands in `locked.txt`. Triton is for GPUs and
tests, so it has a file of its own, too. `image.txt` is what the services need of all that, `build.txt` what makes the
wheel, and `sbom.txt` what makes the bill of materials.
"""

import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
# What only PyTorch's CUDA build needs.
CUDA = re.compile(r"(nvidia|cuda)-|torch==")
TRITON = re.compile(r"triton==")
HEADER = "# Written by `make lock`; every file is pinned by its SHA-256.\n"
# Compiled files whose entries go over as they are, without PyTorch and what it brings.
WHOLE = ("image", "build", "sbom")


def entries(compiled: str) -> list[str]:
    """Return each requirement with its hashes; the comments that say who needs it are left out."""
    lines = [line for line in compiled.splitlines() if not line.lstrip().startswith("#")]
    found: list[str] = []
    for line in lines:
        if line.startswith(" "):
            found[-1] += f"{line}\n"
        elif line:
            found.append(f"{line}\n")
    return found


def cpu_torch(wheel: Path) -> str:
    """Return the entry of PyTorch's CPU build, pinned to one file: the one for this platform and Python."""
    version = wheel.name.split("-")[1].partition("+")[0]
    hashed = subprocess.run(
        [sys.executable, "-m", "pip", "hash", str(wheel)], check=True, capture_output=True, text=True
    ).stdout.splitlines()[1]
    return f"# {wheel.name}\ntorch=={version} \\\n    {hashed}\n"


def write(name: str, content: list[str]) -> None:
    """Write one of the files."""
    (FOLDER / f"{name}.txt").write_text(HEADER + "".join(content))


def main() -> None:
    """Write the files; the arguments are the folder that uv wrote to and the wheel of the CPU build."""
    compiled, wheel = map(Path, sys.argv[1:])
    every = entries((compiled / "locked.txt").read_text())
    write("torch-cuda", [entry for entry in every if CUDA.match(entry)])
    write("triton", [entry for entry in every if TRITON.match(entry)])
    write("locked", [entry for entry in every if not CUDA.match(entry) and not TRITON.match(entry)])
    write("torch-cpu", [cpu_torch(wheel)])
    for name in WHOLE:
        found = entries((compiled / f"{name}.txt").read_text())
        write(name, [entry for entry in found if not CUDA.match(entry) and not TRITON.match(entry)])


if __name__ == "__main__":
    main()
