"""Tables of results for people."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

# Narrower terminals do without confidence intervals; files and pipes are as wide as this.
WIDE_COLUMNS = 132


def results_console() -> Console:
    """Return the console for results: standard output, wide enough where it is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDE_COLUMNS)


def results_table(numbers: Iterable[str]) -> Table:
    """Return an empty table with columns for the method (see `method_cells`) and then for numbers."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    table.add_column("policy", no_wrap=True)
    table.add_column("codec, scorer, scope", no_wrap=True)
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def method_cells(row: Mapping[str, Any]) -> tuple[Text, Text]:
    """The cells that say which method a row is about."""
    return Text(row["policy"]), Text(", ".join(filter(None, (row["codec"], row["scorer"], row["scope"]))))
