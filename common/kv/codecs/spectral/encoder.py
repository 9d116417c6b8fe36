"""Turns a prompt's layers into segments, one after another, within a budget of counted bytes."""

from collections.abc import Iterator

import numpy as np
import torch

from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.kv.codecs.spectral.basis import SpectralBasis
from spectrumkv.common.kv.codecs.spectral.importance import (
    affordable_sinks,
    class_bits,
    step_octaves,
    tier_bytes,
    token_tiers,
)
from spectrumkv.common.kv.codecs.spectral.layout import CLASSES_PER_OCTAVE, LOWEST_CLASS, TokenClasses
from spectrumkv.common.kv.codecs.spectral.rate import BaseSearch, LayerSymbols, RateControl
from spectrumkv.common.kv.codecs.spectral.segment_codec import UncodedSegment, encode_segment
from spectrumkv.common.kv.codecs.spectral.transform import layer_transforms
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.segment import MAX_CHUNK_PAYLOAD_BYTES, SEGMENT_HEADER, KvSegment
from spectrumkv.common.kv.tiers import tier_map_bytes

# The layout has coarser classes. A token that nothing looked at may be looked at later, though, and is coded as if it
# were worth a little less than the mean one.
COARSEST_CLASS = 1
# Length fields and headers of one segment's streams, about.
STREAM_OVERHEAD_BYTES = 300
# Share of a chunk that a segment is planned to fill; what comes out differs.
PLANNED_FILL = 0.6


class SpectralEncoder:
    """A `KvEncoder` that codes the layers of one prompt in their order.

    Args:
        basis: of the model.
        geometry: shape and dtype of the model's cache.
        tokens: of the prompt.
        segment_bytes: for all layers' segments, headers and tier maps included. What is too little even for the
            coarsest steps is exceeded.
        scorer: name of the scorer that ranks tokens.
        seed: for scorers that draw.
    """

    def __init__(
        self, basis: SpectralBasis, geometry: KvGeometry, tokens: int, segment_bytes: int, scorer: str, seed: int
    ) -> None:
        basis.check_fits(geometry)
        self._basis = basis
        self._transforms = layer_transforms(basis)
        self._geometry = geometry
        self._scorer = scorer
        self._seed = seed
        self._rate = RateControl(segment_bytes, basis)
        self._sinks = affordable_sinks(segment_bytes, geometry)
        planned = max(1.0, segment_bytes / (geometry.layers * tokens))
        self._segment_tokens = max(1, int(PLANNED_FILL * MAX_CHUNK_PAYLOAD_BYTES / planned))

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
        layer = self._split(capture, self._step_classes(capture))
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

    def _step_classes(self, capture: LayerCapture) -> np.ndarray:
        """Return the step class of each token: int64 `[n]`."""
        octaves = step_octaves(capture, self._basis, self._scorer, self._seed, self._sinks)
        classes: np.ndarray = np.clip(np.rint(CLASSES_PER_OCTAVE * octaves), LOWEST_CLASS, COARSEST_CLASS)
        return classes.astype(np.int64)

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
