"""Format what a completion used and what a probe found as tables."""

from collections.abc import Iterable, Iterator

from rich import box
from rich.table import Table
from rich.text import Text

from spectrumkv.client.completion import Completion, Usage
from spectrumkv.common.kv.budget import BudgetKind, budget_kind
from spectrumkv.v1 import prefill_pb2

NOT_MEASURED = "–"
# Fraction by which counted bytes may exceed the requested budget before the table explains it.
NOTED_EXCESS = 0.01


def facts_table(facts: Iterable[tuple[str, str]]) -> Table:
    """Return a table of names and values, in which brackets are text and not markup."""
    table = Table(show_header=False, box=None, padding=(0, 2))
    for name, value in facts:
        table.add_row(Text(name), Text(value))
    return table


def usage_table(completion: Completion, budget_asked: float | None) -> Table:
    """Return the table that `spectrumkv generate` prints after the text.

    Args:
        completion: the completion of the request.
        budget_asked: the budget that the request named; None if it left the budget to the server.
    """
    usage, timings = completion.usage, completion.timings
    tokens = f"{usage.prompt_tokens} + {usage.completion_tokens} tokens ({completion.finish_reason})"
    server_ttft = usage.ttft_seconds * 1000.0
    # It is 0 if there was no second token.
    server_handoff = usage.handoff_seconds * 1000.0 if usage.handoff_seconds else None
    return facts_table(
        [
            ("prompt + completion", tokens),
            ("policy, codec, scorer", f"{usage.policy}, {usage.codec}, {usage.scorer}"),
            *((("why this codec", usage.codec_reason),) if usage.codec_reason else ()),
            _budget(usage),
            *_budget_notes(usage, budget_asked),
            ("KV bytes sent / FP16", f"{usage.kv_bytes_sent:,} / {usage.kv_fp16_bytes:,}"),
            *((f"  {one.tier}", f"{one.tokens:,.1f} tokens, {one.bytes:,} bytes") for one in usage.tiers),
            ("TTFT", f"{milliseconds(timings.ttft_ms)} here, {milliseconds(server_ttft)} at the server"),
            ("hand-off", f"{milliseconds(timings.handoff_ms)} here, {milliseconds(server_handoff)} at the server"),
            ("tokens/s after the first", number(timings.tokens_per_second)),
            ("decode worker", usage.decode_worker or NOT_MEASURED),
        ]
    )


def _budget(usage: Usage) -> tuple[str, str]:
    """Return the budget's line; the nominal cost is left out for policies whose budget counts bytes."""
    if budget_kind(usage.policy) is BudgetKind.BYTES:
        return "budget counted", f"{usage.budget_counted:.3f}"
    return "budget counted (nominal)", f"{usage.budget_counted:.3f} ({usage.budget_nominal:.3f})"


def _budget_notes(usage: Usage, asked: float | None) -> Iterator[tuple[str, str]]:
    """Yield a line that explains why more bytes were sent than the budget allows."""
    if asked is None or usage.budget_counted <= asked * (1.0 + NOTED_EXCESS):
        return
    if budget_kind(usage.policy) is BudgetKind.BYTES:
        yield "", f"above the {asked:g} asked for: framing counts too, and short prompts cannot be sent in less"
    else:
        yield "", f"above the {asked:g} asked for, which leaves out scales and framing"


def comparison_table(completions: Iterable[tuple[float, Completion]]) -> Table:
    """Return a table with a row per completion of the same prompt, sent at several budgets.

    Args:
        completions: the requested budget and the completion, in pairs.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    table.add_column("budget", justify="right")
    table.add_column("policy")
    for heading in ("counted", "KV MB sent", "TTFT ms", "hand-off ms", "tokens/s"):
        table.add_column(heading, justify="right")
    table.add_column("prompt tokens")
    for budget, completion in completions:
        usage, timings = completion.usage, completion.timings
        table.add_row(
            f"{budget:g}",
            Text(usage.policy),
            f"{usage.budget_counted:.3f}",
            f"{usage.kv_bytes_sent / 1e6:.2f}",
            number(timings.ttft_ms),
            number(timings.handoff_ms),
            number(timings.tokens_per_second),
            ", ".join(f"{tier.tier} {tier.tokens:.0f}" for tier in usage.tiers if tier.tokens > 0),
        )
    return table


def number(value: float | None) -> str:
    """Return a number with one decimal, or a dash for None, a value that was not measured."""
    return NOT_MEASURED if value is None else f"{value:,.1f}"


def milliseconds(value: float | None) -> str:
    """Return a latency with its unit, or a dash for None, a value that was not measured."""
    return NOT_MEASURED if value is None else f"{value:,.1f} ms"


def probe_tables(verdict: prefill_pb2.ProbeVerdict) -> Iterator[Table]:
    """Yield a table of the settings that the probe tried, and one of the answers that decided on INT4.

    A verdict that comes from a flag has neither.
    """
    if verdict.settings:
        yield _settings_table(verdict)
    if verdict.trials:
        yield _trials_table(verdict)


def probe_summary(verdict: prefill_pb2.ProbeVerdict) -> str:
    """Return the verdict on INT4 in a sentence."""
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
    """Return an answer without control characters, which could control the terminal."""
    return "".join(character if character.isprintable() else " " for character in answer)
