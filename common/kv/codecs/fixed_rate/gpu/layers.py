"""Codes the layers of a prompt on a GPU: the host waits once for each, and the last one until it fits the budget."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from spectrumkv.common.errors import InternalError, NotFiniteError
from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.kv.codecs.body import to_host
from spectrumkv.common.kv.codecs.calibrated.importance import attention_shares
from spectrumkv.common.kv.codecs.calibrated.request import CalibratedRequest
from spectrumkv.common.kv.codecs.fixed_rate.coded_layer import (
    MAY_BE_LEFT,
    CodedLayer,
    SegmentPlan,
    coded_segment,
    demand_of,
    fit_last,
    fixed_bytes,
    refuse_states,
)
from spectrumkv.common.kv.codecs.fixed_rate.gpu.basis import DeviceBasis, device_basis
from spectrumkv.common.kv.codecs.fixed_rate.rate import RateControl
from spectrumkv.common.kv.codecs.fixed_rate.segment_codec import (
    ESCAPE_BYTES,
    HEADER,
    WORD_BYTES,
    LayerSteps,
    SegmentSpan,
    UncodedSegment,
    check_escapes,
)
from spectrumkv.common.kv.codecs.fixed_rate.statistics import SegmentStatistics, calibrated_scales, check_stds
from spectrumkv.common.kv.codecs.fixed_rate.transform import LayerTransform
from spectrumkv.common.kv.segment import MAX_CHUNK_PAYLOAD_BYTES
from spectrumkv.kernels.fixed_rate.layout import LOWEST_GAIN, RowScales
from spectrumkv.kernels.fixed_rate.triton.encoding import encode as kernels
from spectrumkv.kernels.fixed_rate.triton.encoding.memory import CodedLayer as DeviceLayer
from spectrumkv.kernels.fixed_rate.triton.encoding.memory import LayerRate, Workspace
from spectrumkv.kernels.fixed_rate.triton.encoding.segments import (
    SEGMENT_BROKEN,
    SEGMENT_ESCAPES,
    SEGMENT_TOP,
    SEGMENT_WORDS,
    SegmentShape,
)
from spectrumkv.kernels.step_classes import LOWEST_CLASS
from spectrumkv.kernels.upload import aligned

# Room for a body, relative to what it is planned to take, and bytes beside that; more is copied to the host than is
# sent.
ROOM, SPARE_BYTES = 1.7, 4096


class _RoomError(Exception):
    """A body takes more than there is room for."""


@dataclass(frozen=True)
class GpuLayers:
    """What codes the layers of one prompt.

    Attributes:
        request: the prompt.
        gain_level: see `gains.gain_level`.
    """

    request: CalibratedRequest
    gain_level: int

    def code(self, capture: LayerCapture, rate: RateControl, plan: SegmentPlan) -> CodedLayer:
        """Code a layer.

        Args:
            capture: the layer.
            rate: of the request.
            plan: how the layer is cut.

        Returns:
            Its segments; none where one would be too large for a chunk.

        Raises:
            NotFiniteError: an element is infinite or NaN.
            InvalidArgumentError: an element is too large for the codec.
        """
        planned = plan.token_bytes * min(plan.size, capture.tokens)
        if rate.is_last:
            # It takes what is left, which may be more.
            planned = max(planned, rate.left_bytes)
        least = int(ROOM * planned) + self.request.geometry.fp16_bytes_per_layer(plan.sinks) + SPARE_BYTES
        for room in sorted({min(aligned(least), MAX_CHUNK_PAYLOAD_BYTES), MAX_CHUNK_PAYLOAD_BYTES}):
            try:
                return self._code(capture, rate, plan, room)
            except _RoomError:
                continue
        return CodedLayer([], 0, 0)

    def _code(self, capture: LayerCapture, rate: RateControl, plan: SegmentPlan, room: int) -> CodedLayer:
        basis, rows = self.request.basis, self.request.geometry.elements_per_token_layer
        transform, spans = LayerTransform.of_layers(basis)[capture.layer], plan.spans(capture.tokens, rows)
        shape = SegmentShape(capture.tokens, plan.size, plan.sinks, plan.own_tokens(rows), room)
        words = _record_words(rate, fixed_bytes(spans, rows))
        layer, work = self._launch(capture, rate, shape, words, device_basis(basis, capture.keys.device))
        host = layer.copied(to_host(layer.memory))
        self._check(capture, host)
        segments = [_segment(transform, span, host, number) for number, span in enumerate(spans)]
        steps = LayerSteps(host.base, capture.tokens)
        coded = _coded(segments, host, steps)
        rate.drift, rate.smooth_base = host.drift, host.smooth_base
        if not rate.is_last:
            return coded

        def code(other: LayerSteps) -> CodedLayer:
            if other == steps:
                return coded
            kernels.pack_again(layer, work, other.base, other.turn, _starts(segments, other))
            return _coded(segments, layer.copied(to_host(layer.memory)), other)

        return fit_last(segments, demand_of(segments), rate, capture.tokens, steps, code)

    def _launch(
        self, capture: LayerCapture, rate: RateControl, shape: SegmentShape, words: int, on_device: DeviceBasis
    ) -> tuple[DeviceLayer, Workspace]:
        """Return what the GPU will make of the layer, and do not wait for it."""
        kind = on_device.kinds[capture.layer]
        cosine, sine = (one[kind] for one in on_device.angles(shape.tokens))
        return kernels.encode(
            capture.keys,
            capture.values,
            attention_shares(capture, self.request.scorer, self.request.seed),
            (cosine, sine),
            on_device.analysis(capture.layer),
            on_device.gain_scales(self.gain_level)[capture.layer],
            shape,
            LayerRate(words, rate.drift, rate.drift_weight, rate.smooth_base or 0.0, rate.base_weight),
        )

    def _check(self, capture: LayerCapture, host: DeviceLayer) -> None:
        """Refuse a layer of which something is not finite.

        Raises:
            NotFiniteError: an element is infinite or NaN.
            InvalidArgumentError: an element is too large.
        """
        if host.broken_scores:
            raise NotFiniteError(f"keys or queries of layer {capture.layer} are infinite or NaN")
        if any(found[SEGMENT_BROKEN] for found in host.segments):
            half = self.request.geometry.half_dtype
            refuse_states(capture, f"codec fixed_rate, or those of the first tokens for {half}")


def _record_words(rate: RateControl, fixed: int) -> int:
    """Return the words that the records of this and all later layers may take.

    Args:
        rate: of the request.
        fixed: bytes of the layer's segments without records and escapes.
    """
    words = rate.expected_words(fixed)
    if not rate.is_last:
        return words
    # The middle of what is good enough: escapes are foreseen only.
    return words - int(MAY_BE_LEFT * rate.segment_bytes / 2) // WORD_BYTES


def _segment(transform: LayerTransform, span: SegmentSpan, host: DeviceLayer, number: int) -> UncodedSegment:
    """Return what was measured of a segment.

    Raises:
        InvalidArgumentError: a row's standard deviation is too large for the codec.
    """
    body, rows = host.bodies[number * host.shape.body_bytes :].numpy(), transform.rows
    at = HEADER.size + 2 * rows * span.sinks
    sinks = body[HEADER.size : at]
    if not span.coded:
        return UncodedSegment(transform, span, sinks, torch.empty(0, rows), np.empty(0, np.int64), None)
    top = host.segments[number][SEGMENT_TOP]
    if span.own:
        scales = RowScales(top, body[at : at + rows], body[at + rows : at + 2 * rows].view(np.int8))
        at += 2 * rows
    else:
        scales = calibrated_scales(transform.std, top - transform.calibrated.top)
    check_stds(scales)
    tokens = body[at : at + span.coded].astype(np.int64)
    statistics = SegmentStatistics(scales, (tokens >> 4) + LOWEST_GAIN)
    return UncodedSegment(transform, span, sinks, torch.empty(0, rows), (tokens & 15) + LOWEST_CLASS, statistics)


def _starts(segments: Sequence[UncodedSegment], steps: LayerSteps) -> torch.Tensor:
    """Return words before each token's record in its segment: int32 `[n]`."""
    parts = []
    for segment in segments:
        layout = segment.layout(steps)
        parts.append(np.zeros(segment.span.sinks, np.int32))
        if layout is not None:
            parts.append(layout.starts[:-1].astype(np.int32))
    return torch.from_numpy(np.concatenate(parts))


def _coded(uncoded: Sequence[UncodedSegment], host: DeviceLayer, steps: LayerSteps) -> CodedLayer:
    """Return a layer that came from a GPU, once its headers are written.

    Raises:
        _RoomError: a body takes more than there is room for.
        InvalidArgumentError: a coefficient is too large to be sent as it is.
        InternalError: the GPU laid records out otherwise than the host.
    """
    segments, total_words, total_escapes = [], 0, 0
    for number, (one, found) in enumerate(zip(uncoded, host.segments, strict=True)):
        layout, words, escapes = one.layout(steps), found[SEGMENT_WORDS], found[SEGMENT_ESCAPES]
        if layout is not None and layout.words != words:
            raise InternalError(
                f"layer {one.transform.layer}: the GPU's records have {words} words, their layout {layout.words}"
            )
        size = one.span.fixed_bytes(one.transform.rows) + WORD_BYTES * words + ESCAPE_BYTES * escapes
        if size > host.shape.body_bytes:
            raise _RoomError
        body = host.bodies[number * host.shape.body_bytes :][:size]
        body[: HEADER.size] = torch.frombuffer(bytearray(one.header(steps, escapes)), dtype=torch.uint8)
        check_escapes(one.transform.layer, body[size - WORD_BYTES * escapes :].view(torch.float32))
        segments.append(coded_segment(one, body, layout))
        total_words += words
        total_escapes += escapes
    return CodedLayer(segments, total_words, total_escapes)
