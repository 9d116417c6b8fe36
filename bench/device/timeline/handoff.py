"""Join both sides' moments of a hand-off into the time line of its layers, and hand-offs into a row."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

from spectrumkv.bench.device.timeline.clock import DeviceClock
from spectrumkv.bench.device.timeline.decode_side import LayerArrival
from spectrumkv.bench.device.timeline.prefill_side import PrefillMarks


@dataclass(frozen=True)
class LayerTimes:
    """Hold when a layer had passed each stage, in seconds after the prompt was given to the model.

    Attributes:
        layer: from 0.
        computed: the model had computed its keys and values.
        coding: coding of it began.
        coded: all of it was coded, in host memory.
        handed_over: its last chunk was handed over to gRPC.
        arrived: gRPC had handed that chunk over to decode.
        accepted: that chunk was verified, and decoding of the layer's last segment began.
        joined: all of it was in decode's slots.
    """

    layer: int
    computed: float
    coding: float
    coded: float
    handed_over: float
    arrived: float
    accepted: float
    joined: float


# What a layer passes through, in order.
MOMENTS = tuple(one.name for one in fields(LayerTimes))[1:]


@dataclass(frozen=True)
class Handoff:
    """Hold one hand-off.

    Attributes:
        layers: from the first to the last.
        prefill_seconds: until the logits of the first token were on the host.
        message_bytes: of all messages.
    """

    layers: tuple[LayerTimes, ...]
    prefill_seconds: float
    message_bytes: int

    @property
    def seconds(self) -> float:
        """Return the time from the last layer's computation until all KV was in the slots."""
        return max(one.joined for one in self.layers) - max(one.computed for one in self.layers)

    @property
    def ratio(self) -> float:
        """Return the hand-off ÷ the prefill."""
        return self.seconds / self.prefill_seconds


def layer_times(
    marks: PrefillMarks, clock: DeviceClock, arrivals: Sequence[LayerArrival], started: float
) -> tuple[LayerTimes, ...]:
    """Return the layers of one hand-off.

    Args:
        marks: prefill's moments.
        clock: of prefill's device.
        arrivals: decode's moments.
        started: when the prompt was given to the model, in seconds of `time.monotonic`.
    """
    layers = []
    for one in arrivals:
        moments = (
            clock.seconds(marks.computed[one.layer]),
            marks.coding[one.layer],
            marks.coded[one.layer],
            marks.handed_over[one.sequence],
            one.arrived,
            one.accepted,
            one.joined,
        )
        layers.append(LayerTimes(one.layer, *(moment - started for moment in moments)))
    return tuple(layers)


def handoff_row(handoffs: Sequence[Handoff], fp16_bytes: int) -> dict[str, Any]:
    """Return the medians of several hand-offs in milliseconds, and the layers of the one with the median hand-off.

    Args:
        handoffs: of one contender, without the one that warmed up.
        fp16_bytes: what the prompt's KV would take at 16 bits an element.
    """
    # The lower of two.
    typical = sorted(handoffs, key=lambda one: one.seconds)[(len(handoffs) - 1) // 2]
    steps = {
        f"{before}_to_{after}_ms": 1e3
        * statistics.median(getattr(one, after) - getattr(one, before) for one in typical.layers)
        for before, after in pairwise(MOMENTS)
    }
    return {
        "prefill_ms": 1e3 * statistics.median(one.prefill_seconds for one in handoffs),
        "handoff_ms": 1e3 * statistics.median(one.seconds for one in handoffs),
        "handoff_ratio": statistics.median(one.ratio for one in handoffs),
        "budget_counted": typical.message_bytes / fp16_bytes,
        **steps,
        "rounds": [{"prefill_ms": 1e3 * one.prefill_seconds, "handoff_ms": 1e3 * one.seconds} for one in handoffs],
        "layers": [asdict(one) for one in typical.layers],
    }
