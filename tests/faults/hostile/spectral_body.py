"""The body of a spectral segment in its parts, so that each can be made to lie, and put together again."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from spectrumkv.common.kv.codecs.spectral.coefficients import Quantization
from spectrumkv.common.kv.codecs.spectral.segment_codec import HEADER, LENGTHS, decode_segment
from spectrumkv.common.kv.codecs.spectral.symbols import EXCEPTION
from spectrumkv.common.kv.codecs.spectral.transform import LayerTransform
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.segment import KvSegment


@dataclass
class StreamParts:
    """What a body holds of one stream: coded symbols, raw bits, exceptions."""

    coded: bytes
    raw: bytes
    exceptions: bytes

    @property
    def lengths(self) -> tuple[int, int]:
        return len(self.coded), len(self.exceptions) // EXCEPTION.itemsize


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
        lengths: of each stream's coded symbols, and how many exceptions it has, as the body says.
        streams: what follows.
        rows: how many coefficients a token has.
        end: whatever comes after.
    """

    base: float
    sinks: int
    class_bytes: int
    deviation_bytes: int
    exact: bytes
    classes: bytes
    deviation: bytes
    lengths: list[tuple[int, int]]
    streams: list[StreamParts]
    rows: int
    end: bytes = b""

    def make_lengths_agree(self) -> None:
        """Make the body say what it holds."""
        self.class_bytes, self.deviation_bytes = len(self.classes), len(self.deviation)
        self.lengths = [one.lengths for one in self.streams]

    def assembled(self) -> bytes:
        """The bytes; of even length, as a segment has them."""
        lengths = self.class_bytes & 0xFFFFFFFF, self.deviation_bytes & 0xFFFFFFFF
        parts = [HEADER.pack(self.base, self.sinks & 0xFFFF, *lengths), self.exact, self.classes, self.deviation]
        parts.append((np.array(self.lengths, np.int64) & 0xFFFFFFFF).astype("<u4").tobytes())
        for one in self.streams:
            parts += [one.coded, one.raw, one.exceptions]
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
    lengths: list[tuple[int, int]] = []
    streams: list[StreamParts] = []
    if sinks < tokens:
        lengths, streams = _streams(taker, quantization)
    return SpectralBody(
        base,
        sinks,
        class_bytes,
        deviation_bytes,
        exact,
        classes,
        deviation,
        lengths,
        streams,
        geometry.elements_per_token_layer,
    )


def _streams(taker: "_Taker", quantization: Quantization) -> tuple[list[tuple[int, int]], list[StreamParts]]:
    raw_bytes = quantization.packed.raw_bytes.tolist()
    lengths = [
        (int(coded), int(exceptions))
        for coded, exceptions in np.frombuffer(taker.take(len(raw_bytes) * LENGTHS.itemsize), LENGTHS)
    ]
    streams = [
        StreamParts(taker.take(coded), taker.take(raw), taker.take(exceptions * EXCEPTION.itemsize))
        for raw, (coded, exceptions) in zip(raw_bytes, lengths, strict=True)
    ]
    return lengths, streams


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
