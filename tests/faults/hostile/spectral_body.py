"""The body of a spectral segment in its parts, so that each can be made to lie, and put together again."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from spectrumkv.common.kv.codecs.spectral.segment_codec import HEADER, LENGTH, decode_segment
from spectrumkv.common.kv.codecs.spectral.symbols import EXCEPTION
from spectrumkv.common.kv.codecs.spectral.transform import LayerTransform
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.segment import KvSegment


@dataclass
class SpectralBody:
    """A body, part by part, as kv.proto lays it out.

    Attributes:
        base: binary logarithm of the step of class 0.
        sinks: how many there are, as the header says.
        class_bytes: length of the coded classes, as the header says.
        deviation_bytes: length of the deviation, as the header says.
        exact: keys and values of the sinks.
        classes: coded step classes.
        deviation: coded deviation from the calibrated model.
        exception_count: how many exceptions there are, as the body says.
        gap_bytes: length of each frame of gaps before it was coded.
        lengths: of each frame, as the body says.
        frames: coded symbols.
        raw: raw bits of all streams.
        exceptions: of all streams.
        rows: how many coefficients a token has.
        has_streams: whether there is a token that is no sink.
        end: whatever comes after.
    """

    base: float
    sinks: int
    class_bytes: int
    deviation_bytes: int
    exact: bytes
    classes: bytes
    deviation: bytes
    exception_count: int
    gap_bytes: list[int]
    lengths: list[int]
    frames: list[bytes]
    raw: bytes
    exceptions: bytes
    rows: int
    has_streams: bool
    end: bytes = b""

    def make_lengths_agree(self) -> None:
        """Make the body say what it holds."""
        self.class_bytes, self.deviation_bytes = len(self.classes), len(self.deviation)
        self.lengths = [len(one) for one in self.frames]
        self.exception_count = len(self.exceptions) // EXCEPTION.itemsize

    def assembled(self) -> bytes:
        """The bytes; of even length, as a segment has them."""
        lengths = self.class_bytes & 0xFFFFFFFF, self.deviation_bytes & 0xFFFFFFFF
        parts = [HEADER.pack(self.base, self.sinks & 0xFFFF, *lengths), self.exact, self.classes, self.deviation]
        if self.has_streams:
            numbers = np.array([self.exception_count, *self.gap_bytes, *self.lengths], np.int64)
            parts += [(numbers & 0xFFFFFFFF).astype("<u4").tobytes(), *self.frames, self.raw, self.exceptions]
        body = b"".join([*parts, self.end])
        return body + b"\0" * (len(body) % 2)


def taken_apart(body: bytes, tokens: int, transform: LayerTransform, geometry: KvGeometry) -> SpectralBody:
    """Inverse of `SpectralBody.assembled`, for a sound body.

    Raises:
        DataLossError: it is not one.
    """
    states = torch.empty(2, geometry.kv_heads, tokens, geometry.head_dim)
    quantization = decode_segment(transform, memoryview(body), 0, geometry, states[0], states[1])
    base, sinks, class_bytes, deviation_bytes = HEADER.unpack_from(body)
    exact_bytes = 2 * 2 * geometry.kv_heads * sinks * geometry.head_dim
    taker = _Taker(body, HEADER.size)
    exact, classes, deviation = taker.take(exact_bytes), taker.take(class_bytes), taker.take(deviation_bytes)
    packed = quantization.packed
    gaps, frames = len(packed.gap_streams), len(packed.frame_start) - 1
    numbers = [0]
    if sinks < tokens:
        numbers = np.frombuffer(taker.take((1 + gaps + frames) * LENGTH.itemsize), LENGTH).tolist()
    coded = [taker.take(length) for length in numbers[1 + gaps :]]
    raw = taker.take(int(packed.raw_start[-1]) * 4)
    exceptions = taker.take(numbers[0] * EXCEPTION.itemsize)
    return SpectralBody(
        base=base,
        sinks=sinks,
        class_bytes=class_bytes,
        deviation_bytes=deviation_bytes,
        exact=exact,
        classes=classes,
        deviation=deviation,
        exception_count=numbers[0],
        gap_bytes=numbers[1 : 1 + gaps],
        lengths=numbers[1 + gaps :],
        frames=coded,
        raw=raw,
        exceptions=exceptions,
        rows=geometry.elements_per_token_layer,
        has_streams=sinks < tokens,
    )


def with_body(segment: KvSegment, body: bytes) -> KvSegment:
    """The segment with another body."""
    return replace(segment, body=torch.frombuffer(bytearray(body), dtype=torch.uint8))


def serialized(segments: Sequence[KvSegment]) -> bytes:
    """Segments back to back, as a chunk has them."""
    return b"".join(part for segment in segments for part in (segment.header, segment.body.numpy().tobytes()))


class _Taker:
    def __init__(self, data: bytes, position: int) -> None:
        self._data, self._position = data, position

    def take(self, size: int) -> bytes:
        taken = self._data[self._position : self._position + size]
        self._position += size
        return taken
