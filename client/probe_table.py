"""The INT4 probe's verdict, as a table for people."""

from rich.table import Table
from rich.text import Text

from spectrumkv.v1 import prefill_pb2


def probe_table(verdict: prefill_pb2.ProbeVerdict) -> Table:
    """Return the trials under a title that says what follows from them."""
    allowed = "allowed" if verdict.int4_allowed else "not allowed"
    title = Text(f"INT4 {allowed} ({verdict.source}): {verdict.reason}")
    table = Table(title=title, title_justify="left")
    for heading in ("prompt tokens", "needle's depth", "found", "found over exact KV", "answer"):
        table.add_column(heading)
    for trial in verdict.trials:
        found, found_fp16 = ("yes" if one else "no" for one in (trial.found, trial.found_fp16))
        table.add_row(
            str(trial.prompt_tokens), f"{trial.depth:.0%}", found, found_fp16, Text(_printable(trial.answer))
        )
    return table


def _printable(answer: str) -> str:
    """What a model says may hold anything, such as sequences that control a terminal."""
    return "".join(character if character.isprintable() else " " for character in answer)
