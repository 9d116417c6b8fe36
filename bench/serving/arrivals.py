"""Measure how a long prompt's KV that arrives at decode delays the tokens of running streams."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import torch

from spectrumkv.bench.models.synthetic_prompt import SyntheticCache, synthetic_basis
from spectrumkv.bench.serving.decode_streams import Recording, arrive, record, running_streams
from spectrumkv.client.request import KvChoice
from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.rpc.decode_methods import begin_basis
from spectrumkv.common.service.config import PrefillConfig, build
from spectrumkv.prefill_server.transfer.plan import KvPlan
from spectrumkv.prefill_server.verdict import ProbeVerdict
from spectrumkv.v1 import kv_pb2

# Upper bound of the tokens that a stream generates during one arrival.
TOKENS_PER_ARRIVAL = 64


@dataclass(frozen=True)
class ArrivalLoad:
    """Say how many streams run, and what arrives beside them.

    Attributes:
        streams: number of streams.
        running_tokens: prompt tokens of each stream.
        arriving_tokens: prompt tokens of the KV that arrives.
        arrivals: number of arrivals.
        pause_tokens: tokens of each stream between two arrivals.

    Raises:
        InvalidArgumentError: a number is below 1.
    """

    streams: int
    running_tokens: int
    arriving_tokens: int
    arrivals: int
    pause_tokens: int

    def __post_init__(self) -> None:
        if min(self.streams, self.arrivals, self.pause_tokens) < 1:
            raise InvalidArgumentError("--streams, --arrivals and --pause-tokens must each be 1 or more")

    @property
    def lasting_tokens(self) -> int:
        """Return how many tokens a stream must generate to last for the whole measurement."""
        return (self.arrivals + 2) * (self.pause_tokens + TOKENS_PER_ARRIVAL)


def measure(
    channel: grpc.Channel,
    spec: kv_pb2.ModelSpec,
    choices: Sequence[KvChoice],
    load: ArrivalLoad,
    on_arrival: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Send recorded KV to decode repeatedly while streams generate, once for each choice.

    Args:
        channel: the connection to a decode service.
        spec: spec of the decode service's model.
        choices: how the KV is sent.
        load: streams and arrivals.
        on_arrival: called after each arrival with a text that says which one it was.

    Returns:
        A row for each choice.

    Raises:
        SpectrumKVError: a choice is not allowed, or decode refuses the KV.
    """
    geometry = KvGeometry(spec.layers, spec.kv_heads, spec.head_dim, getattr(torch, spec.dtype))
    short, long = (
        SyntheticCache.random(geometry, tokens, torch.device("cpu"))
        for tokens in (load.running_tokens, load.arriving_tokens)
    )
    config = build(PrefillConfig, {})
    basis = synthetic_basis(geometry)
    verdict = ProbeVerdict.from_flag("on", geometry.layers)
    plans = [KvPlan.resolve(choice.to_proto(), config, verdict, 0, basis) for choice in choices]
    # Some plan may need the basis; a decode service keeps it.
    begin_basis(channel, basis, timeout=None)[0].result()
    rows = []
    for plan in plans:
        running, arriving = (
            record(spec, cache, plan, config.window, config.chunk_bytes, max_tokens)
            for cache, max_tokens in ((short, load.lasting_tokens), (long, None))
        )
        rows.append(
            _row(plan, load, arriving.budget_counted, measure_gaps(channel, running, arriving, load, on_arrival))
        )
    return rows


def measure_gaps(
    channel: grpc.Channel,
    running: Recording,
    arriving: Recording,
    load: ArrivalLoad,
    on_arrival: Callable[[str], None],
) -> dict[str, Any]:
    """Return the columns of a row that come from the gaps between the tokens of running streams.

    Args:
        channel: the connection to a decode service.
        running: the request of each stream, which must last for the whole measurement.
        arriving: the request whose KV arrives.
        load: streams and arrivals.
        on_arrival: called after each arrival with a text that says which one it was.
    """
    intervals = []
    with running_streams(channel, running, load.streams) as generating:
        generating.wait_for_tokens(load.pause_tokens)
        warm = time.monotonic()
        for number in range(load.arrivals):
            generating.wait_for_tokens(load.pause_tokens)
            intervals.append(arrive(channel, arriving))
            on_arrival(f"arrival {number + 1} of {load.arrivals}")
        generating.wait_for_tokens(1)
        gaps = [gap for gap in generating.gaps() if gap[0] >= warm]
    touched = [any(start < gap[1] and gap[0] < end for start, end in intervals) for gap in gaps]
    milliseconds = [1000 * (end - start) for start, end in gaps]
    return {
        "streams": load.streams,
        "arrivals": load.arrivals,
        "arrival_ms": 1000 * statistics.median(end - start for start, end in intervals),
        **_latencies("undisturbed", [one for one, hit in zip(milliseconds, touched, strict=True) if not hit]),
        **_latencies("arrival", [one for one, hit in zip(milliseconds, touched, strict=True) if hit]),
    }


def _row(plan: KvPlan, load: ArrivalLoad, budget_counted: float, measured: Mapping[str, Any]) -> dict[str, Any]:
    row = {
        "policy": plan.policy.name,
        "codec": plan.codec.name,
        "budget_target": plan.budget.value,
        "budget_counted": budget_counted,
        "arriving_tokens": load.arriving_tokens,
        **measured,
    }
    for name in ("median", "p99"):
        row[f"{name}_itl_ratio"] = row[f"{name}_arrival_itl_ms"] / row[f"{name}_undisturbed_itl_ms"]
    return row


def _latencies(name: str, gaps: Sequence[float]) -> dict[str, Any]:
    median, p99 = np.percentile(gaps, [50, 99]).tolist()
    return {f"{name}_gaps": len(gaps), f"median_{name}_itl_ms": median, f"p99_{name}_itl_ms": p99}
