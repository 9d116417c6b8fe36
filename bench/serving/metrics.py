"""Compute a row from requests: the keys of `vllm bench serve`, and those of the hand-off."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spectrumkv.bench.serving.load import Answer, LoadResult
from spectrumkv.client.timings import Timings
from spectrumkv.common.errors import InvalidArgumentError

# Metrics that a goodput may bound, and their fields in `Timings`.
GOODPUT_METRICS = {"ttft": "ttft_ms", "tpot": "tpot_ms", "e2el": "e2el_ms"}
LATENCIES = ("ttft", "tpot", "itl", "e2el", "handoff")


@dataclass(frozen=True)
class Goodput:
    """Hold the bounds, in milliseconds, of a good request.

    Attributes:
        bounds: the bounds by metric: "ttft", "tpot" or "e2el".
    """

    bounds: Mapping[str, float]

    @classmethod
    def parse(cls, texts: Sequence[str]) -> "Goodput":
        """Return the bounds in texts such as "ttft:500" and "tpot:50".

        Raises:
            InvalidArgumentError: a text is not such a bound.
        """
        bounds = {}
        for text in texts:
            name, _, limit = text.partition(":")
            if name not in GOODPUT_METRICS or not limit.replace(".", "", 1).isdecimal():
                allowed = ", ".join(f"{one}:MILLISECONDS" for one in GOODPUT_METRICS)
                raise InvalidArgumentError(f"--goodput {text}; allowed: {allowed}")
            bounds[name] = float(limit)
        return cls(bounds)

    def kept_by(self, timings: Timings) -> bool:
        """Return whether a request keeps all bounds; a request of a single token has no TPOT and keeps that bound."""
        return all((getattr(timings, GOODPUT_METRICS[name]) or 0.0) <= limit for name, limit in self.bounds.items())


def metrics_row(rounds: Sequence[LoadResult], goodput: Goodput) -> dict[str, Any]:
    """Return the metrics of one system.

    Args:
        rounds: the loads that it served, one after another; requests are pooled and durations added.
        goodput: bounds of a good request; without bounds, `request_goodput` is None.
    """
    served = [one for result in rounds for one in result.served]
    done = [one for one in served if one.answer is not None]
    answers = [one.answer for one in served if one.answer is not None]
    timings = [one.timings for one in done]
    duration = sum(result.duration for result in rounds)
    output_tokens = sum(len(one.arrivals) for one in answers)
    fp16_bytes = sum(one.kv_fp16_bytes for one in answers)
    sent_bytes = sum(one.kv_bytes_sent for one in answers)
    good = sum(goodput.kept_by(one) for one in timings)
    row: dict[str, Any] = {
        "duration": duration,
        "completed": len(done),
        "failed": len(served) - len(done),
        "total_input_tokens": sum(one.prompt_tokens for one in done),
        "total_output_tokens": output_tokens,
        "request_throughput": len(done) / duration,
        "request_goodput": good / duration if goodput.bounds else None,
        "output_throughput": output_tokens / duration,
        "decode_throughput": _decode_throughput(rounds),
    }
    samples: dict[str, list[float]] = {
        "ttft": _known(one.ttft_ms for one in timings),
        "tpot": _known(one.tpot_ms for one in timings),
        "itl": [gap for one in timings for gap in one.itl_ms],
        "e2el": [one.e2el_ms for one in timings],
        "handoff": _known(one.handoff_ms for one in timings),
    }
    for name in LATENCIES:
        row |= _statistics(name, samples[name])
    return row | {
        "kv_sent_bytes": sent_bytes,
        "budget_counted": sent_bytes / fp16_bytes if fp16_bytes else None,
        "first_error": next((f"{one.error.code}: {one.error.message}" for one in served if one.error), None),
    }


def add_ratios_to_baseline(rows: Sequence[dict[str, Any]], baseline: str) -> None:
    """Add to every row its TTFT and throughputs divided by the baseline's, and its hand-off divided by its own ITL.

    Args:
        rows: the rows of one run.
        baseline: the `system` of the baseline's row; without such a row the ratios to it are None.
    """
    against = next((row for row in rows if row["system"] == baseline), None)
    for row in rows:
        for key in ("median_ttft_ms", "output_throughput", "decode_throughput"):
            row[f"{key}_ratio"] = _ratio(row[key], against[key] if against else None)
        row["handoff_itl_ratio"] = _ratio(row["median_handoff_ms"], row["median_itl_ms"])


def _ratio(value: float | None, reference: float | None) -> float | None:
    return value / reference if value is not None and reference else None


def _known(values: Iterable[float | None]) -> list[float]:
    return [one for one in values if one is not None]


def _statistics(name: str, samples: Sequence[float]) -> dict[str, float | None]:
    if not samples:
        return {f"{statistic}_{name}_ms": None for statistic in ("mean", "median", "std", "p99")}
    return {
        f"mean_{name}_ms": float(np.mean(samples)),
        f"median_{name}_ms": float(np.median(samples)),
        f"std_{name}_ms": float(np.std(samples)),
        f"p99_{name}_ms": float(np.percentile(samples, 99)),
    }


def _decode_throughput(rounds: Sequence[LoadResult]) -> float | None:
    """Return the tokens after each request's first ÷ the seconds in which some request was past its first token."""
    tokens, seconds = 0, 0.0
    for result in rounds:
        spans = [_decode_span(one.started, one.answer) for one in result.served if one.answer is not None]
        tokens += sum(count for _, _, count in spans)
        covered_until = 0.0
        for first, last, _ in sorted(spans):
            seconds += max(0.0, last - max(first, covered_until))
            covered_until = max(covered_until, last)
    return tokens / seconds if seconds else None


def _decode_span(started: float, answer: Answer) -> tuple[float, float, int]:
    """Return the times of the first and last token on the load's clock, and the number of tokens after the first."""
    return started + answer.arrivals[0], started + answer.arrivals[-1], len(answer.arrivals) - 1
