"""Turns a prompt's layers into segments, one after another, within a budget of counted bytes."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.kv.codecs.calibrated.importance import step_classes
from spectrumkv.common.kv.codecs.calibrated.request import CalibratedRequest
from spectrumkv.common.kv.codecs.calibrated.sinks import code_sinks
from spectrumkv.common.kv.codecs.fixed_rate.coded_layer import (
    CodedLayer,
    SegmentPlan,
    coded_segment,
    demand_of,
    fit_last,
    last_steps,
    refuse_states,
)
from spectrumkv.common.kv.codecs.fixed_rate.gains import gain_level, gain_scales
from spectrumkv.common.kv.codecs.fixed_rate.kernel_fault import kernels_code
from spectrumkv.common.kv.codecs.fixed_rate.rate import RateControl
from spectrumkv.common.kv.codecs.fixed_rate.segment_codec import (
    LayerSteps,
    SegmentSpan,
    UncodedSegment,
    encode_segment,
)
from spectrumkv.common.kv.codecs.fixed_rate.statistics import measure
from spectrumkv.common.kv.codecs.fixed_rate.transform import LayerTransform
from spectrumkv.common.kv.segment import KvSegment
from spectrumkv.kernels.fixed_rate.dispatch import analyse

# First tokens that are sent in the 16-bit dtype. Others that are unlike the rest have gains and escapes.
SINKS = 1


class FixedRateEncoder:
    """A `KvEncoder` that codes the layers of one prompt in their order.

    Args:
        request: the prompt.

    Attributes:
        gain_level: which coefficients tell a token's gain; see `gains.gain_level`.
    """

    def __init__(self, request: CalibratedRequest) -> None:
        self._request = request
        self._transforms = LayerTransform.of_layers(request.basis)
        self.gain_level = gain_level(self._transforms, request.token_bytes)
        self._rate = RateControl(request.segment_bytes, self._transforms)
        self._sink_count = min(SINKS, request.sinks)
        self._segment_tokens = request.segment_tokens

    def encode(self, capture: LayerCapture) -> Iterator[KvSegment]:
        """Code a layer; see `KvEncoder.encode`.

        Args:
            capture: the layer.

        Yields:
            Its segments.

        Raises:
            NotFiniteError: an element is infinite or NaN.
            InvalidArgumentError: an element is too large for the codec.
        """
        coded = self._layer(capture)
        while coded.is_too_large and self._segment_tokens > 1:
            # This layer takes more than others. Later ones may, too.
            self._segment_tokens = -(-min(self._segment_tokens, capture.tokens) // 2)
            coded = self._layer(capture)
        self._rate.account(coded.wire_bytes, coded.words, coded.escapes)
        yield from coded.segments

    def _layer(self, capture: LayerCapture) -> CodedLayer:
        if kernels_code(capture.keys.device):
            return self._on_gpu(capture)
        capture = _on_host(capture)
        segments, rate = self._segments(capture), self._rate
        demand = demand_of(segments)
        rate.observe(demand)
        if not rate.is_last:
            return _coded(segments, LayerSteps(rate.base(demand), capture.tokens))
        steps = last_steps(segments, demand, rate.expected_words(demand.fixed_bytes))
        return fit_last(segments, demand, rate, self._request.tokens, steps, partial(_coded, segments))

    def _on_gpu(self, capture: LayerCapture) -> CodedLayer:
        # Triton takes a while to import, and exists on Linux only.
        from spectrumkv.common.kv.codecs.fixed_rate.gpu.layers import GpuLayers

        return GpuLayers(self._request, self.gain_level).code(capture, self._rate, self._plan)

    @property
    def _plan(self) -> SegmentPlan:
        return SegmentPlan(self._segment_tokens, self._sink_count, self._request.token_bytes)

    def _segments(self, capture: LayerCapture) -> list[UncodedSegment]:
        request = self._request
        classes = step_classes(capture, request.basis, request.scorer, request.seed, self._sink_count)
        spans = self._plan.spans(len(classes), self._transforms[capture.layer].rows)
        return [self._segment(capture, classes, span) for span in spans]

    def _segment(self, capture: LayerCapture, classes: np.ndarray, span: SegmentSpan) -> UncodedSegment:
        """Transform a run of tokens.

        Returns:
            The segment.

        Raises:
            NotFiniteError: an element is infinite or NaN.
            InvalidArgumentError: an element is too large for the codec.
        """
        transform = self._transforms[capture.layer]
        exact, coded = slice(span.first, span.first_coded), slice(span.first_coded, span.end)
        sinks = code_sinks(capture.keys[:, exact], capture.values[:, exact], capture.layer, self._request.geometry)
        if not span.coded:
            return UncodedSegment(transform, span, sinks, torch.empty(0, transform.rows), classes[coded], None)
        analysis = transform.analysis(span.first_coded, span.coded)
        scale = gain_scales(self._request.basis, self.gain_level)[capture.layer]
        coefficients, energy = analyse(capture.keys[:, coded], capture.values[:, coded], analysis, scale)
        if not bool(energy.isfinite().all()):
            refuse_states(capture, "codec fixed_rate")
        statistics = measure(coefficients, energy, transform.std, span.own)
        return UncodedSegment(transform, span, sinks, coefficients, classes[coded], statistics)


def _on_host(capture: LayerCapture) -> LayerCapture:
    queries, keys, values = (one.cpu() for one in (capture.queries, capture.keys, capture.values))
    return replace(capture, queries=queries, keys=keys, values=values)


def _coded(uncoded: Sequence[UncodedSegment], steps: LayerSteps) -> CodedLayer:
    segments: list[KvSegment] = []
    words = escapes = 0
    for one in uncoded:
        coded = encode_segment(one, steps)
        segments.append(coded_segment(one, torch.frombuffer(coded.body, dtype=torch.uint8), coded.layout))
        words += coded.layout.words if coded.layout is not None else 0
        escapes += coded.escapes
    return CodedLayer(segments, words, escapes)
