"""The index of decision records has every record, under its own number and title."""

import re
from pathlib import Path

import pytest

from tests.docs.documents import ROOT

RECORDS = ROOT / "docs" / "adr"
INDEX = (RECORDS / "README.md").read_text()
ROW = re.compile(
    r"^\| (?:\[(?P<linked>\d+)\]\((?P<file>[^)]+)\)|(?P<plain>\d+)) \| (?P<title>[^|]+) \|", re.MULTILINE
)
ROWS = list(ROW.finditer(INDEX))
PARTS = ["Context", "Decision", "Consequences", "Status"]


def test_every_record_has_a_row_and_every_row_with_a_link_a_record() -> None:
    files = sorted(path.name for path in RECORDS.glob("[0-9]*.md"))
    assert [row["file"] for row in ROWS if row["file"]] == files


def test_numbers_rise_and_none_is_used_twice() -> None:
    numbers = [int(row["linked"] or row["plain"]) for row in ROWS]
    assert numbers == sorted(set(numbers))


@pytest.mark.parametrize("row", [row for row in ROWS if row["file"]], ids=lambda row: row["file"])
def test_a_record_has_the_number_and_title_of_its_row_and_all_parts(row: re.Match[str]) -> None:
    path = Path(row["file"])
    text = (RECORDS / path).read_text()
    assert text.splitlines()[0] == f"# ADR {row['linked']}: {row['title']}"
    assert path.name.split("-")[0] == f"{int(row['linked']):04}"
    assert re.findall(r"^## (\w+)$", text, re.MULTILINE) == PARTS
