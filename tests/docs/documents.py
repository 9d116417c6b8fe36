"""The documents that the tests of this folder read."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
DOCUMENTS = (README, *sorted((ROOT / "docs").rglob("*.md")))


def name_of(path: Path) -> str:
    """Return a path as the documents write it, relative to the root."""
    return path.relative_to(ROOT).as_posix()
