"""Counts what workers did, for vLLM's log line and its Prometheus endpoint."""

import threading
from dataclasses import dataclass, field
from typing import Any

# Every metric: its name there, what it counts, and the label that its values differ by.
COUNTERS: dict[str, tuple[str, str]] = {
    "kv_bytes_coded_total": ("Bytes of codes and scales of handed-out KV, by tier.", "tier"),
    "kv_fp16_equivalent_bytes_total": ("Bytes of the same KV at 16 bits an element.", "codec"),
    "kv_tokens_coded_total": ("Prompt tokens whose KV was coded, by codec.", "codec"),
    "kv_fallbacks_total": (
        "Prompts whose KV was handed out exactly, by why the wanted policy was not kept.",
        "reason",
    ),
    "kv_transfers_failed_total": ("Transfers that could not be handed out, by gRPC status.", "reason"),
    "kv_transfers_orphaned_total": ("Transfers that nobody fetched in time.", "reason"),
    "kv_bytes_fetched_total": ("Bytes of all messages that were fetched, framing included, by codec.", "codec"),
    "kv_tokens_loaded_total": ("Prompt tokens whose KV was fetched and not computed, by codec.", "codec"),
    "kv_loads_failed_total": ("Loads that failed, by gRPC status.", "reason"),
    "kv_prefetches_total": (
        "Transfers that were announced before their requests came, by how that ended: used, late, off, or a status.",
        "outcome",
    ),
    "kv_requests_rejected_total": ("Requests whose parameters or prompt did not fit, by what was wrong.", "reason"),
}

# What rises and falls; counts of these are changes, and they have no label.
GAUGES = {"kv_outbox_bytes": "Bytes that the outbox holds, and has reserved for KV that is being coded."}

Counts = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Tally:
    """Adds up counts from several threads.

    Attributes:
        counts: by metric and label.
    """

    counts: Counts
    _lock: threading.Lock
    _levels: dict[str, float] = field(default_factory=dict)

    @classmethod
    def empty(cls) -> "Tally":
        """Return a tally without counts."""
        return cls({}, threading.Lock())

    def add(self, metric: str, label: str, number: float = 1) -> None:
        """Count something.

        Args:
            metric: one of `COUNTERS`.
            label: its label's value.
            number: how much.
        """
        with self._lock:
            labels = self.counts.setdefault(metric, {})
            labels[label] = labels.get(label, 0) + number

    def set_level(self, metric: str, level: float) -> None:
        """Count by how much something rose or fell since the last call.

        Args:
            metric: one of `GAUGES`.
            level: what it is now.
        """
        change = level - self._levels.get(metric, 0)
        self._levels[metric] = level
        if change:
            self.add(metric, "", change)

    def take(self) -> Counts:
        """Return the counts since the last call."""
        with self._lock:
            taken = {metric: dict(labels) for metric, labels in self.counts.items()}
            self.counts.clear()
            return taken


def added(one: Counts, other: Counts) -> Counts:
    """Return the sums of two counts.

    Args:
        one: by metric and label.
        other: like `one`.
    """
    summed = {metric: dict(labels) for metric, labels in one.items()}
    for metric, labels in other.items():
        into = summed.setdefault(metric, {})
        for label, number in labels.items():
            into[label] = into.get(label, 0) + number
    return summed


def shown(counts: Counts) -> dict[str, Any]:
    """Return counts as a log line has them: one number for each metric and label, but none for changes of levels.

    Args:
        counts: by metric and label.
    """
    return {
        f"{metric}[{label}]": number
        for metric, labels in sorted(counts.items())
        if metric not in GAUGES
        for label, number in labels.items()
    }
