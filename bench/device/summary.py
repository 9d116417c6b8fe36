"""Say in a line or a few what the rows of each stage show."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from spectrumkv.bench.device.stage import Outcome
from spectrumkv.bench.report.console import plain_table

Rows = Sequence[Mapping[str, Any]]


def summary_table(outcomes: Sequence[Outcome], caveat: str) -> Table:
    """Return the table at the end of a device check.

    Args:
        outcomes: of its stages.
        caveat: what to say of all figures; empty for nothing.
    """
    table = plain_table(("stage", "outcome"), ("s",))
    table.add_column("what it found")
    for outcome in outcomes:
        found = SUMMARIES[outcome.stage](outcome.rows) if outcome.rows else []
        table.add_row(
            outcome.stage,
            outcome.verdict,
            f"{outcome.seconds:.0f}",
            Text("\n".join([*outcome.reasons, *found])),
        )
    table.caption = caveat or None
    return table


def _kernels(rows: Rows) -> list[str]:
    counts = {name: sum(row[name] for row in rows) for name in ("passed", "failed", "skipped")}
    return [", ".join(f"{count} {name}" for name, count in counts.items())]


def _codec(rows: Rows) -> list[str]:
    return [
        f"{row['codec']} {row['tier']}: encode {row['encode_ratio']:.2f}, decode {row['decode_ratio']:.2f} × copy"
        for row in rows
    ]


def _model(rows: Rows) -> list[str]:
    return [f"{row['shape']}, {row['bytes'] / 1e9:.1f} GB, in {row['seconds']:.0f} s" for row in rows]


def _timeline(rows: Rows) -> list[str]:
    return [
        f"{row['contender']}{' with MPS' if row['mps'] else ''}: hand-off {row['handoff_ms']:.1f} ms ÷ prefill "
        f"{row['prefill_ms']:.1f} ms = {row['handoff_ratio']:.2f}; prefill alone {row['prefill_alone_ms']:.1f} ms"
        for row in rows
    ]


def _streams(rows: Rows) -> list[str]:
    return [
        f"{row['streams']} × {row['contender']}: TTFT {_ms(row['median_ttft_ms'])}, "
        f"TPOT {_ms(row['median_tpot_ms'])}, ITL {_ms(row['median_itl_ms'])} (p99 {_ms(row['p99_itl_ms'])}), "
        f"{row['output_throughput']:.1f} tokens/s"
        for row in rows
    ]


def _ms(value: float | None) -> str:
    return "none" if value is None else f"{value:.1f} ms"


SUMMARIES: dict[str, Callable[[Rows], list[str]]] = {
    "kernels": _kernels,
    "codec": _codec,
    "model": _model,
    "timeline": _timeline,
    "streams": _streams,
}
