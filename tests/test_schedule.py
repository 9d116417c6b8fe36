from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.schedule import SECONDS, longest_first

LONG, SHORTER = list(SECONDS)[:2]


def item(nodeid: str) -> Any:
    return SimpleNamespace(nodeid=nodeid)


def test_long_files_begin_and_others_follow_by_their_number_of_tests() -> None:
    tests = ["tests/few.py::b", "tests/many.py::a", f"{SHORTER}::z", "tests/many.py::b", f"{LONG}::b", f"{LONG}::a"]
    items = [item(nodeid) for nodeid in tests]
    longest_first(items)
    assert [one.nodeid for one in items] == [
        f"{LONG}::b", f"{LONG}::a", f"{SHORTER}::z", "tests/many.py::a", "tests/many.py::b", "tests/few.py::b"
    ]  # fmt: skip


def test_every_file_that_begins_early_exists() -> None:
    root = Path(__file__).parents[1]
    assert [name for name in SECONDS if not (root / name).is_file()] == []
