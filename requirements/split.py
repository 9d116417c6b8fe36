"""Splits what `uv pip compile` found into the files that `make install LOCKED=…` reads: `make lock` runs it.

PyTorch is published twice: on PyPI for CUDA, with several gigabytes of libraries behind it, and on its own index for
CPUs, without them. So each has a file of its own, and what both need stands in `locked.txt`.
"""

import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
# What only PyTorch's CUDA build needs.
CUDA = re.compile(r"(nvidia|cuda)-")
HEADER = "# Written by `make lock`; every file is pinned by its SHA-256.\n"


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


def main() -> None:
    """Write the three files; the arguments are what uv wrote and the wheel of the CPU build."""
    compiled, wheel = map(Path, sys.argv[1:])
    both, cuda = [], []
    for entry in entries(compiled.read_text()):
        (cuda if CUDA.match(entry) or entry.startswith("torch==") else both).append(entry)
    for name, content in (("locked", both), ("torch-cuda", cuda), ("torch-cpu", [cpu_torch(wheel)])):
        (FOLDER / f"{name}.txt").write_text(HEADER + "".join(content))


if __name__ == "__main__":
    main()
