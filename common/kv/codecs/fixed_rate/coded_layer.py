"""A layer's segments, coded; and the last layer, which is coded until it takes what is left of the budget."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

import numpy as np
import torch

from spectrumkv.common.errors import InvalidArgumentError, NotFiniteError
from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.kv.codecs.fixed_rate.rate import LayerDemand, RateControl, StepSearch
from spectrumkv.common.kv.codecs.fixed_rate.segment_codec import WORD_BYTES, LayerSteps, SegmentSpan, UncodedSegment
from spectrumkv.common.kv.codecs.fixed_rate.tiers import record_tiers, tier_bytes
from spectrumkv.common.kv.segment import MAX_CHUNK_PAYLOAD_BYTES, SEGMENT_HEADER, KvSegment
from spectrumkv.common.kv.tiers import tier_map_bytes
from spectrumkv.kernels.fixed_rate.layout import PROFILES, RecordLayout

# Fraction of the budget that the last layer may leave unused.
MAY_BE_LEFT = 0.0005
# Largest fraction of a segment's bytes that standard deviations and means of its own may take.
OWN_SCALES_SHARE = 0.1


@dataclass(frozen=True)
class SegmentPlan:
    """How layers are cut into segments.

    Attributes:
        size: tokens of a segment; the last one of a layer may have fewer.
        sinks: how many of the first tokens are sent without the transform.
        token_bytes: what a token of a layer may take.
    """

    size: int
    sinks: int
    token_bytes: float

    def own_tokens(self, rows: int) -> int:
        """Return from how many coded tokens on a segment has scales of its own.

        Args:
            rows: coefficients of a token.
        """
        return math.ceil(2 * rows / (OWN_SCALES_SHARE * self.token_bytes))

    def spans(self, tokens: int, rows: int) -> list[SegmentSpan]:
        """Cut a layer.

        Args:
            tokens: of the layer.
            rows: coefficients of a token.

        Returns:
            The runs of tokens, in order.
        """
        found, own_tokens = [], self.own_tokens(rows)
        for first in range(0, tokens, self.size):
            length = min(self.size, tokens - first)
            sinks = min(max(0, self.sinks - first), length)
            found.append(SegmentSpan(first, sinks, length - sinks, length - sinks >= own_tokens))
        return found


class CodedLayer(NamedTuple):
    """The segments of a layer, none where they are too large; the words of their records, and their escapes."""

    segments: list[KvSegment]
    words: int
    escapes: int

    @property
    def wire_bytes(self) -> int:
        """Count the bytes that the segments take of a budget."""
        return sum(segment.wire_bytes for segment in self.segments)

    @property
    def is_too_large(self) -> bool:
        """Tell whether a segment does not fit a chunk."""
        return not self.segments or any(segment.wire_bytes > MAX_CHUNK_PAYLOAD_BYTES for segment in self.segments)


def coded_segment(segment: UncodedSegment, body: torch.Tensor, layout: RecordLayout | None) -> KvSegment:
    """Return what is sent of a segment.

    Args:
        segment: that was coded.
        body: uint8 `[b]`.
        layout: of its records.
    """
    tiers = record_tiers(layout, segment.transform.rows, segment.span.sinks)
    shares = tier_bytes(layout, tiers, len(segment.sinks), body.numel())
    return KvSegment(segment.transform.layer, segment.span.first, tiers, body, shares)


def fixed_bytes(spans: Sequence[SegmentSpan], rows: int) -> int:
    """Count the bytes of a layer's segments without records and escapes.

    Args:
        spans: of the layer.
        rows: coefficients of a token.

    Returns:
        Bytes.
    """
    return sum(SEGMENT_HEADER.size + tier_map_bytes(one.length) + one.fixed_bytes(rows) for one in spans)


def demand_of(segments: Sequence[UncodedSegment]) -> LayerDemand:
    """Return what the records of a layer take.

    Args:
        segments: of the layer.
    """
    coded = [segment.statistics for segment in segments if segment.statistics is not None]
    fixed = fixed_bytes([segment.span for segment in segments], segments[0].transform.rows)
    profiles = [
        np.bincount(segment.profiles, minlength=PROFILES) for segment in segments if segment.statistics is not None
    ]
    return LayerDemand([one.scales.group_exponents for one in coded], profiles, fixed)


def last_steps(segments: Sequence[UncodedSegment], demand: LayerDemand, words: int) -> LayerSteps:
    """Find the steps with which the last layer's records come nearest to a number of words, from below.

    Args:
        segments: of the layer.
        demand: of the layer.
        words: that its records may take.

    Returns:
        The finest base that all tokens can have, or one finer, and up to where tokens can have that.
    """
    base = demand.finest_base(words)
    finer, end = LayerSteps(base - 1, 0), 0
    for segment in segments:
        end = segment.span.end
        layout = segment.layout(finer)
        if layout is None:
            continue
        costs = layout.words_of_profile.reshape(2, -1)
        words -= int(costs[1][segment.profiles].sum())
    for segment in segments:
        layout = segment.layout(finer)
        if layout is None:
            continue
        costs = layout.words_of_profile.reshape(2, -1)
        more = np.cumsum((costs[0] - costs[1])[segment.profiles])
        if words < more[-1]:
            finer_tokens = int(np.searchsorted(more, words, side="right"))
            return LayerSteps(base - 1, segment.span.first_coded + finer_tokens)
        words -= int(more[-1])
    return LayerSteps(base - 1, end)


def fit_last(
    segments: Sequence[UncodedSegment],
    demand: LayerDemand,
    rate: RateControl,
    tokens: int,
    steps: LayerSteps,
    code: Callable[[LayerSteps], CodedLayer],
) -> CodedLayer:
    """Code the last layer with steps that take what is left of the budget and no more.

    Args:
        segments: of the layer.
        demand: of the layer.
        rate: of the request.
        tokens: of the prompt.
        steps: to begin with.
        code: codes the layer with some steps.

    Returns:
        The layer, coded.
    """
    search = StepSearch(tokens, rate.left_bytes, MAY_BE_LEFT * rate.segment_bytes)
    coded = best = code(steps)
    while not search.tried(steps, coded.wire_bytes):
        # All but the records is known now, and hardly changes with the steps.
        others = coded.wire_bytes - WORD_BYTES * coded.words
        steps = search.next_steps(last_steps(segments, demand, (rate.left_bytes - others) // WORD_BYTES))
        coded = code(steps)
        if rate.is_better(coded.wire_bytes, best.wire_bytes):
            best = coded
    return best


def refuse_states(capture: LayerCapture, too_large_for: str) -> NoReturn:
    """Refuse a layer of which something that was computed is infinite or NaN.

    Args:
        capture: the layer.
        too_large_for: what its elements are too large for where all of them are finite.

    Raises:
        InvalidArgumentError: all elements are finite.
        NotFiniteError: an element is infinite or NaN.
    """
    if bool(capture.keys.isfinite().all()) and bool(capture.values.isfinite().all()):
        raise InvalidArgumentError(f"keys or values of layer {capture.layer} are too large for {too_large_for}")
    raise NotFiniteError(f"keys or values of layer {capture.layer} are infinite or NaN")
