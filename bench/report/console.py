"""How far a bench has come: a bar on a terminal, a line now and then elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# Seconds between lines where there is no terminal.
LINE_SECONDS = 30.0


@contextmanager
def progress(total: int, console: Console) -> Iterator[Callable[[str], None]]:
    """Show progress while the block runs.

    Args:
        total: steps.
        console: where to.

    Returns:
        What is called after each step with what has been done.
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


class _Lines:
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
