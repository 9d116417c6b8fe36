"""Tries `make install LOCKED=…` without fetching what it would install: `make check-lock` runs it.

uv resolves the files that the recipe names as pip would, in hash mode: each package that another one needs must be
pinned. Then it resolves pyproject.toml under the locked versions: it may ask for nothing that is not locked, and each
file that is locked must be on the index still, with the hash that is listed. Of gigabytes, only metadata is fetched.
"""

import re
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
# For all that is tried.
SECONDS = 180.0
# What uv says where it reaches no index; it then says nothing of the files.
UNREACHABLE = ("client error", "dns error", "error sending request", "timed out")
# Where the CPU build of PyTorch is, as `make lock` has it.
CPU_INDEX = "https://download.pytorch.org/whl/cpu"

# Hashes by "name==version".
Hashes = dict[str, set[str]]


class UnreachableError(Exception):
    """The index did not answer, so that nothing was tried."""


def main() -> int:
    """Return 1 where a locked set cannot be installed, else 0; print of each set what came of it."""
    ends_at = time.monotonic() + SECONDS
    faults = 0
    for locked in ("1", "cpu"):
        files = files_of_recipe(locked)
        more = ["--extra-index-url", CPU_INDEX] if locked == "cpu" else []
        try:
            found = [*unpinned(files, more, ends_at), *not_on_the_index(files, more, ends_at)]
        except UnreachableError as error:
            print(f"LOCKED={locked}: skipped: the index cannot be reached: {error}")
            continue
        faults += len(found)
        print(f"LOCKED={locked}: {'; '.join(found) or 'can be installed from ' + ', '.join(files)}")
    return 1 if faults else 0


def files_of_recipe(locked: str) -> list[str]:
    """Return the requirements files that `make install LOCKED=…` has pip read in hash mode."""
    # For a virtual environment that is not there; of one that stands, make would print nothing.
    command = ["make", "--no-print-directory", "-n", "install", f"LOCKED={locked}", "VENV=build/none"]
    recipe = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    _, _, hashed = recipe.partition("--require-hashes")
    return re.findall(r"-r (\S+\.txt)", hashed)


def unpinned(files: list[str], more: list[str], ends_at: float) -> list[str]:
    """Return what uv says where an installation in hash mode would fail; nothing where it would not."""
    named = [argument for name in files for argument in ("-r", name)]
    command = ["install", "--dry-run", "--reinstall", "--require-hashes", "--python", sys.executable, *more, *named]
    done = uv(command, ends_at)
    return [done.stderr.strip()] if done.returncode else []


def not_on_the_index(files: list[str], more: list[str], ends_at: float) -> list[str]:
    """Return a sentence for each package that pyproject.toml asks for and that cannot be had as it is locked."""
    text = "\n".join((ROOT / name).read_text() for name in files)
    locked = hashes_by_pin(text)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as versions:
        # Without hashes, which would be taken for what the index has.
        versions.write("\n".join(re.findall(r"^\w[^\\\n]*==[^\\\n]*", text, re.M)))
        versions.flush()
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        asked = [argument for extra in extras for argument in ("--extra", extra)]
        sources = ["pyproject.toml", "requirements/build.in", "-c", versions.name, *more]
        done = uv(["compile", "--generate-hashes", "--python", sys.executable, *asked, *sources], ends_at)
    if done.returncode:
        return [done.stderr.strip()]
    found = hashes_by_pin(done.stdout)
    return [
        f"{pin} is not locked" if pin not in locked else f"{pin} has no file on the index with a hash that is locked"
        for pin, hashes in found.items()
        if not hashes & locked.get(pin, set())
    ]


def hashes_by_pin(text: str) -> Hashes:
    """Return the hashes of each package of a requirements file."""
    entries = re.split(r"^(?=[\w.-]+(?:\[[\w,-]+\])?==)", text, flags=re.M)[1:]
    return {re.split(r"[\s\\;]", entry)[0]: set(re.findall("sha256:([0-9a-f]{64})", entry)) for entry in entries}


def uv(arguments: list[str], ends_at: float) -> "subprocess.CompletedProcess[str]":
    """Run `uv pip`.

    Returns:
        How it ended.

    Raises:
        UnreachableError: it reaches no index, or has no answer in time.
    """
    command = [sys.executable, "-m", "uv", "-q", "pip", *arguments]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=max(1.0, ends_at - time.monotonic()),
        )
    except subprocess.TimeoutExpired:
        raise UnreachableError(f"no answer within {SECONDS:g} s") from None
    if done.returncode and any(sign in done.stderr for sign in UNREACHABLE):
        raise UnreachableError(done.stderr.strip().splitlines()[-1].strip())
    return done


if __name__ == "__main__":
    sys.exit(main())
