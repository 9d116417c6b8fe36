"""Turns a prompt's layers into segments, one after another, within a budget of counted bytes."""

from collections.abc import Iterator

import numpy as np
import torch

from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.kv.codecs.calibrated.importance import step_classes
from spectrumkv.common.kv.codecs.calibrated.request import CalibratedRequest
from spectrumkv.common.kv.codecs.spectral.layout import TokenClasses
from spectrumkv.common.kv.codecs.spectral.rate import BaseSearch, LayerSymbols, RateControl
from spectrumkv.common.kv.codecs.spectral.segment_codec import UncodedSegment, encode_segment
from spectrumkv.common.kv.codecs.spectral.tiers import class_bits, tier_bytes, token_tiers
from spectrumkv.common.kv.codecs.spectral.transform import LayerTransform
from spectrumkv.common.kv.segment import MAX_CHUNK_PAYLOAD_BYTES, SEGMENT_HEADER, KvSegment
from spectrumkv.common.kv.tiers import tier_map_bytes

# Length fields and headers of one segment's streams, about.
STREAM_OVERHEAD_BYTES = 300


class SpectralEncoder:
    """A `KvEncoder` that codes the layers of one prompt in their order.

    Args:
        request: the prompt.
    """

    def __init__(self, request: CalibratedRequest) -> None:
        self._request = request
        self._geometry = request.geometry
        self._transforms = LayerTransform.of_layers(request.basis)
        self._rate = RateControl(request.segment_bytes, request.basis)
        self._sinks = request.sinks
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
        request = self._request
        classes = step_classes(capture, request.basis, request.scorer, request.seed, self._sinks)
        layer = self._split(capture, classes)
        symbols = LayerSymbols.of(layer)
        base = self._rate.base(symbols, self._fixed_bytes)
        segments = self._segments(layer, base)
        if self._rate.done == self._geometry.layers - 1:
            segments = self._fit(layer, base, segments)
        expected = self._rate.expected_bytes(symbols, base, self._fixed_bytes)
        self._rate.account(_wire_bytes(segments), expected)
        yield from segments

    def _split(self, capture: LayerCapture, classes: np.ndarray) -> list[UncodedSegment]:
        transform = self._transforms[capture.layer]
        keys, values = capture.keys.cpu(), capture.values.cpu()
        layer = []
        for first in range(0, len(classes), self._segment_tokens):
            span = slice(first, first + self._segment_tokens)
            tokens = TokenClasses(classes[span], self._sinks if first == 0 else 0)
            layer.append(UncodedSegment(transform, first, keys[:, span], values[:, span], tokens))
        return layer

    @property
    def _fixed_bytes(self) -> int:
        """Return the bytes that a layer takes whatever its steps."""
        return self._sinks * self._geometry.fp16_bytes_per_layer(1) + STREAM_OVERHEAD_BYTES

    def _segments(self, layer: list[UncodedSegment], base: float) -> list[KvSegment]:
        return [coded for segment in layer for coded in self._code(segment, base)]

    def _code(self, segment: UncodedSegment, base: float) -> Iterator[KvSegment]:
        """Code a segment, or each half of one that does not fit a chunk.

        Yields:
            Segments that fit chunks.
        """
        body, quantization = encode_segment(segment, base, self._geometry)
        if len(body) + SEGMENT_HEADER.size + tier_map_bytes(segment.length) > MAX_CHUNK_PAYLOAD_BYTES:
            for half in segment.halves():
                yield from self._code(half, base)
            return
        coded = torch.frombuffer(body, dtype=torch.uint8)
        bits = class_bits(quantization.model, quantization.base)
        tiers = token_tiers(bits, segment.tokens)
        shares = tier_bytes(bits, segment.tokens, tiers, len(body))
        yield KvSegment(segment.transform.layer, segment.first, tiers, coded, shares)

    def _fit(self, layer: list[UncodedSegment], base: float, segments: list[KvSegment]) -> list[KvSegment]:
        """Return the last layer, coded with other steps until it takes what is left of the budget and no more."""
        symbols = sum(segment.length for segment in layer) * self._geometry.elements_per_token_layer
        rate = self._rate
        search = BaseSearch(rate.left_bytes, rate.may_be_left, symbols, rate.finest, rate.coarsest)
        best: list[KvSegment] | None = None
        while not search.tried(base, _wire_bytes(segments)):
            if search.is_best(base):
                best = segments
            base = search.next_base()
            segments = self._segments(layer, base)
        return segments if search.is_best(base) or best is None else best


def _wire_bytes(segments: list[KvSegment]) -> int:
    return sum(segment.wire_bytes for segment in segments)
