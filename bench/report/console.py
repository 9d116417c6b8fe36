"""Show a bench on the terminal: how far it has come, and its results as a table."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

# Seconds between lines of progress if the console is not a terminal.
LINE_SECONDS = 30.0
# Narrower terminals get tables without confidence intervals; files and pipes get this width.
WIDE_COLUMNS = 132


@contextmanager
def progress(total: int, console: Console) -> Iterator[Callable[[str], None]]:
    """Show progress while the block runs: a bar on a terminal, a line every 30 s elsewhere.

    Args:
        total: number of steps.
        console: shows the progress.

    Yields:
        A function to call after each step with a text that says what was done.
    """
    if not console.is_terminal:
        yield _Lines(total, console)
        return
    doing, counts = (TextColumn("{task.description}"), BarColumn()), (MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*doing, *counts, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task("starting", total=total)

        def step(done: str) -> None:
            bar.update(task, advance=1, description=done)

        yield step


def results_console() -> Console:
    """Return the console for results: standard output, with a fixed width if it is not a terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDE_COLUMNS)


def plain_table(texts: Iterable[str], numbers: Iterable[str]) -> Table:
    """Return an empty table.

    Args:
        texts: headings of the left-aligned columns, which come first.
        numbers: headings of the right-aligned columns.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    for heading in texts:
        table.add_column(heading)
    for heading in numbers:
        table.add_column(heading, justify="right")
    return table


def methods_table(numbers: Iterable[str]) -> Table:
    """Return an empty table whose first columns are those of `method_cells`, followed by columns for numbers."""
    table = plain_table(("policy", "codec, scorer, scope"), numbers)
    for column in table.columns:
        column.no_wrap = True
    return table


def method_cells(row: Mapping[str, Any]) -> tuple[Text, Text]:
    """Return the cells that name the method of a row."""
    return Text(row["policy"]), Text(", ".join(filter(None, (row["codec"], row["scorer"], row["scope"]))))


class _Lines:
    """Print a line of progress now and then."""

    def __init__(self, total: int, console: Console) -> None:
        self._total = total
        self._console = console
        self._done = 0
        self._started = self._shown = time.monotonic()

    def __call__(self, done: str) -> None:
        self._done += 1
        now = time.monotonic()
        if now - self._shown < LINE_SECONDS:
            return
        self._shown = now
        left = (now - self._started) / self._done * (self._total - self._done)
        self._console.print(f"{self._done} of {self._total}, about {left / 60:.0f} min left: {done}", markup=False)
