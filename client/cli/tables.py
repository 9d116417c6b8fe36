"""What a completion used, as a table for people."""

from collections.abc import Iterable, Iterator

from rich import box
from rich.table import Table
from rich.text import Text

from spectrumkv.client.completion import Completion, Usage

NOT_MEASURED = "–"
# Policies whose budget is kept in bytes on the wire (`Policy.budget_kind`, which could not be asked without
# loading torch).
COUNTED_POLICIES = frozenset({"spectral"})
# By how much counted bytes may exceed the budget asked for before that is worth a note.
NOTED_EXCESS = 0.01


def facts_table(facts: Iterable[tuple[str, str]]) -> Table:
    """Return a table of names and values, which may hold anything: brackets are not taken for markup."""
    table = Table(show_header=False, box=None, padding=(0, 2))
    for name, value in facts:
        table.add_row(Text(name), Text(value))
    return table


def usage_table(completion: Completion, budget_asked: float | None) -> Table:
    """Return the table that `spectrumkv generate` prints after the text.

    Args:
        completion: what came of the request.
        budget_asked: the budget that the request named; None where it left that to the server.
    """
    usage, timings = completion.usage, completion.timings
    tokens = f"{usage.prompt_tokens} + {usage.completion_tokens} tokens ({completion.finish_reason})"
    server_ttft = usage.ttft_seconds * 1000.0
    # 0 says that there was no second token.
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
    """The nominal cost says nothing of a budget that is counted."""
    if usage.policy in COUNTED_POLICIES:
        return "budget counted", f"{usage.byte_budget:.3f}"
    return "budget counted (nominal)", f"{usage.byte_budget:.3f} ({usage.tier_budget:.3f})"


def _budget_notes(usage: Usage, asked: float | None) -> Iterator[tuple[str, str]]:
    """Why more was sent than was asked for."""
    if asked is None or usage.byte_budget <= asked * (1.0 + NOTED_EXCESS):
        return
    if usage.policy in COUNTED_POLICIES:
        yield "", f"above the {asked:g} asked for: framing counts too, and short prompts cannot be sent in less"
    else:
        yield "", f"above the {asked:g} asked for, which leaves out scales and framing"


def comparison_table(completions: Iterable[tuple[float, Completion]]) -> Table:
    """Return one row per completion, for the same prompt sent at several budgets.

    Args:
        completions: the budget that was asked for, and what came of it.
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
            f"{usage.byte_budget:.3f}",
            f"{usage.kv_bytes_sent / 1e6:.2f}",
            number(timings.ttft_ms),
            number(timings.handoff_ms),
            number(timings.tokens_per_second),
            ", ".join(f"{tier.tier} {tier.tokens:.0f}" for tier in usage.tiers if tier.tokens > 0),
        )
    return table


def number(value: float | None) -> str:
    """Format what may not have been measured, with one decimal."""
    return NOT_MEASURED if value is None else f"{value:,.1f}"


def milliseconds(value: float | None) -> str:
    """Format a latency with its unit."""
    return NOT_MEASURED if value is None else f"{value:,.1f} ms"
