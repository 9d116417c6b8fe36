"""What the probe found, as tables for people."""

from collections.abc import Iterator

from rich.table import Table
from rich.text import Text

from spectrumkv.v1 import prefill_pb2


def probe_tables(verdict: prefill_pb2.ProbeVerdict) -> Iterator[Table]:
    """Yield the settings that were tried, and the answers that the verdict on INT4 rests on; nothing for a flag."""
    if verdict.settings:
        yield _settings_table(verdict)
    if verdict.trials:
        yield _trials_table(verdict)


def probe_summary(verdict: prefill_pb2.ProbeVerdict) -> str:
    """Return in a sentence what follows."""
    allowed = "allowed" if verdict.int4_allowed else "not allowed"
    return f"{allowed} ({verdict.source}): {verdict.reason}"


def _settings_table(verdict: prefill_pb2.ProbeVerdict) -> Table:
    table = Table(title="settings against exact KV", title_justify="left")
    for heading in ("policy", "codec", "budget", "needles found", "KL, nats a token", "Δ perplexity %", "safe"):
        table.add_column(heading)
    for one in verdict.settings:
        table.add_row(
            one.policy,
            one.codec,
            f"{one.budget:g}",
            f"{one.found} of {one.found_fp16}",
            f"{one.kl:.1e}",
            f"{one.ppl_delta_pct:+.3f}",
            "yes" if one.safe else "no",
            style="bold" if verdict.HasField("safe_budget") and _is_strongest(one, verdict) else None,
        )
    return table


def _is_strongest(one: prefill_pb2.ProbedSetting, verdict: prefill_pb2.ProbeVerdict) -> bool:
    return one.safe and one.budget == verdict.safe_budget


def _trials_table(verdict: prefill_pb2.ProbeVerdict) -> Table:
    table = Table(title="needles over INT4", title_justify="left")
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
