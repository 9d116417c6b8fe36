"""One layer's tokens to bytes and back; the layout of a body is documented at `KvChunk` in kv.proto."""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from spectrumkv.common.errors import DataLossError, InvalidArgumentError, NotFiniteError
from spectrumkv.common.kv.codecs.body import BodyReader
from spectrumkv.common.kv.codecs.calibrated.sinks import code_sinks, write_sinks
from spectrumkv.common.kv.codecs.spectral.coefficients import CoefficientModel, Deviation, Quantization
from spectrumkv.common.kv.codecs.spectral.layout import TokenClasses
from spectrumkv.common.kv.codecs.spectral.symbols import EXCEPTION, CodedStreams, PackedStreams, compress, decompress
from spectrumkv.common.kv.codecs.spectral.transform import LayerTransform
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.kernels.step_classes import CLASSES_PER_OCTAVE, HIGHEST_CLASS, LOWEST_CLASS

HEADER = struct.Struct("<fHII")
LENGTH = np.dtype("<u4")
# Largest magnitude of the binary logarithm of a step.
LARGEST_BASE = 64.0
# Integers have 32 bits; some room is left for the rounding of the quotient.
LARGEST_SYMBOL = 2.0**30


@dataclass(frozen=True, eq=False)
class UncodedSegment:
    """A run of tokens of one layer that is to be coded.

    Attributes:
        transform: of the layer.
        first: position of the first token.
        keys: `[kv_heads, n, head_dim]` on the CPU, after the rotary embedding.
        values: like `keys`.
        tokens: the tokens' classes.
    """

    transform: LayerTransform
    first: int
    keys: torch.Tensor
    values: torch.Tensor
    tokens: TokenClasses

    @property
    def length(self) -> int:
        """Count the tokens."""
        return self.keys.shape[1]

    @cached_property
    def coded_states(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Return keys and values, `[kv_heads, n, head_dim]`, of tokens with a step, and the first one's position."""
        sinks = self.tokens.sinks
        return self.keys[:, sinks:], self.values[:, sinks:], self.first + sinks

    @cached_property
    def deviation(self) -> Deviation | None:
        """Measure how the segment's coefficients differ from the calibrated ones; None where that cannot be told."""
        return self.transform.deviation(*self.coded_states)

    @cached_property
    def measured(self) -> CoefficientModel:
        """Return the best model of the segment's coefficients, whether it is worth sending or not."""
        calibrated = self.transform.calibrated
        return calibrated if self.deviation is None else self.deviation.of(calibrated)

    def model(self, base: float) -> tuple[CoefficientModel, bytes]:
        """Choose the model that the segment is coded with.

        Args:
            base: binary logarithm of the step of class 0.

        Returns:
            The model, and the bytes of its deviation: none where the deviation saves less than it takes.
        """
        if self.deviation is not None:
            saved = len(self.tokens.coded) * self.deviation.saved_bits(self.measured, base)
            if saved > 8 * len(self.deviation.coded):
                return self.measured, self.deviation.coded
        return self.transform.calibrated, b""

    def halves(self) -> "Iterator[UncodedSegment]":
        """Cut the run in two.

        Yields:
            The first half of the tokens, and the others.
        """
        half = self.length // 2
        for start, end in ((0, half), (half, self.length)):
            classes, sinks = self.tokens.classes[start:end], min(max(0, self.tokens.sinks - start), end - start)
            yield UncodedSegment(
                self.transform,
                self.first + start,
                self.keys[:, start:end],
                self.values[:, start:end],
                TokenClasses(classes, sinks),
            )


def encode_segment(segment: UncodedSegment, base: float, geometry: KvGeometry) -> tuple[bytearray, Quantization]:
    """Code a run of tokens.

    Args:
        segment: the tokens.
        base: binary logarithm of the step of class 0, a float32.
        geometry: shape and dtype of the model's cache.

    Returns:
        The body, and how coefficients were quantized: by coarser steps than wanted where integers would not have 32
        bits.

    Raises:
        NotFiniteError: an element is infinite or NaN.
        InvalidArgumentError: a sink does not fit the 16-bit dtype, or an element has no step that is fine enough.
    """
    span = slice(0, segment.tokens.sinks)
    sinks = code_sinks(segment.keys[:, span], segment.values[:, span], segment.transform.layer, geometry)
    coded_classes = compress(segment.tokens.coded)
    model, deviation = segment.model(base)
    quantization, coded = _coded_streams(segment, Quantization(base, segment.tokens, model))
    if not abs(quantization.base) <= LARGEST_BASE:
        raise InvalidArgumentError(
            f"keys or values of layer {segment.transform.layer} want steps of 2^{quantization.base:g}; codec "
            f"spectral has those from 2^-{LARGEST_BASE:g} to 2^{LARGEST_BASE:g}"
        )
    parts: list[bytes | memoryview] = [
        HEADER.pack(quantization.base, segment.tokens.sinks, len(coded_classes), len(deviation)),
        sinks.data,
        coded_classes,
        deviation,
    ]
    if coded is not None:
        parts += _serialized(coded)
    parts.append(b"\0" * (sum(map(len, parts)) % 2))
    return bytearray().join(parts), quantization


def _coded_streams(segment: UncodedSegment, wanted: Quantization) -> tuple[Quantization, CodedStreams | None]:
    """Return how coefficients were quantized, and the streams of the tokens that have a step if there are any.

    Raises:
        NotFiniteError: an element is infinite or NaN.
    """
    if not len(segment.tokens.coded):
        return wanted, None
    symbols, largest = segment.transform.quantize(*segment.coded_states, wanted)
    if not largest < math.inf:
        raise NotFiniteError(f"keys or values of layer {segment.transform.layer} are infinite or NaN")
    finest = _finest_base(largest)
    if wanted.base < finest:
        return _coded_streams(segment, replace(wanted, base=finest))
    return wanted, wanted.packed.encode(symbols)


def _serialized(coded: CodedStreams) -> Iterator[bytes | memoryview]:
    """Yield the streams as a body has them: lengths, frames, raw bits, exceptions."""
    exceptions = len(coded.exceptions) // EXCEPTION.itemsize
    yield np.array([exceptions, *coded.gap_bytes, *map(len, coded.frames)], LENGTH).tobytes()
    yield from coded.frames
    yield coded.raw
    yield coded.exceptions


def _finest_base(largest: float) -> float:
    """Return the least base step, a float32, at which integers have 32 bits, whatever their tokens' classes."""
    return float(np.float32(math.log2(max(largest, 1e-30) / LARGEST_SYMBOL) - LOWEST_CLASS / CLASSES_PER_OCTAVE))


def decode_segment(
    transform: LayerTransform,
    body: memoryview,
    first: int,
    geometry: KvGeometry,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> Quantization:
    """Decode a run of tokens: the inverse of `encode_segment`.

    Args:
        transform: of the layer.
        body: uint8 `[b]` as it arrived.
        first: position of the first token.
        geometry: shape and dtype of the model's cache.
        keys: `[kv_heads, n, head_dim]` in the model's own dtype, any strides, on any device; written.
        values: like `keys`.

    Returns:
        How coefficients were quantized.

    Raises:
        DataLossError: the body does not hold what its header says.
    """
    reader = BodyReader(body)
    exact, quantization = _read_quantization(transform, reader, keys.shape[1], geometry)
    sinks = quantization.tokens.sinks
    if sinks:
        write_sinks(exact, geometry, keys[:, :sinks], values[:, :sinks])
    if len(quantization.tokens.coded):
        symbols = quantization.packed.decode(_streams(reader, quantization.packed))
        transform.dequantize(symbols, first + sinks, quantization, keys[:, sinks:], values[:, sinks:])
    reader.finish(padding=1)
    return quantization


def quantization_of(transform: LayerTransform, body: memoryview, tokens: int, geometry: KvGeometry) -> Quantization:
    """Read how a body's coefficients were quantized, without them.

    Args:
        transform: of the layer.
        body: uint8 `[b]`.
        tokens: of the segment.
        geometry: shape and dtype of the model's cache.

    Returns:
        How coefficients were quantized.

    Raises:
        DataLossError: the body does not hold what its header says.
    """
    _, quantization = _read_quantization(transform, BodyReader(body), tokens, geometry)
    return quantization


def _read_quantization(
    transform: LayerTransform, reader: BodyReader, tokens: int, geometry: KvGeometry
) -> tuple[np.ndarray, Quantization]:
    """Read a body up to its streams.

    Returns:
        The bytes of the sinks, and how the other tokens' coefficients were quantized.

    Raises:
        DataLossError: the body does not hold what its header says.
    """
    base, sinks, class_bytes, deviation_bytes = reader.header(HEADER)
    if not abs(base) <= LARGEST_BASE:
        raise DataLossError(f"a segment's steps have the exponent {base}", "scale")
    if sinks > tokens:
        raise DataLossError(f"a segment of {tokens} tokens has {sinks} sinks", "malformed")
    exact = reader.array(geometry.fp16_bytes_per_layer(sinks), np.uint8)
    classes = decompress(reader.take(class_bytes), tokens - sinks).astype(np.int64)
    if len(classes) and classes.max() > HIGHEST_CLASS - LOWEST_CLASS:
        raise DataLossError(f"a segment has the step class {classes.max() + LOWEST_CLASS}", "malformed")
    of_tokens = np.concatenate([np.zeros(sinks, np.int64), classes + LOWEST_CLASS])
    model = transform.calibrated
    if deviation_bytes:
        model = Deviation.decoded(reader.take(deviation_bytes), len(model.classes)).of(model)
    return exact, Quantization(base, TokenClasses(of_tokens, sinks), model)


def _streams(reader: BodyReader, packed: PackedStreams) -> CodedStreams:
    """Return the streams of a body: the inverse of `_serialized`."""
    gaps, frames = len(packed.gap_streams), len(packed.frame_start) - 1
    exceptions, *lengths = reader.array(1 + gaps + frames, LENGTH).tolist()
    coded = [reader.take(length) for length in lengths[gaps:]]
    raw = reader.take(int(packed.raw_start[-1]) * np.dtype(np.uint32).itemsize)
    return CodedStreams(lengths[:gaps], coded, raw, reader.take(exceptions * EXCEPTION.itemsize))
