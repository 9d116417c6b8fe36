"""One layer's tokens to bytes and back; the layout of a body is documented at `KvChunk` in kv.proto."""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from spectrumkv.common.errors import DataLossError, InvalidArgumentError
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.spectral.layout import (
    CLASSES_PER_OCTAVE,
    HIGHEST_CLASS,
    LOWEST_CLASS,
    STEP_CLASSES,
)
from spectrumkv.common.kv.spectral.symbols import (
    EXCEPTION,
    CodedStream,
    PackedStreams,
    compress,
    decompress,
    edges,
)
from spectrumkv.common.kv.spectral.transform import LayerTransform
from spectrumkv.kernels import spectral_streams as kernels

HEADER = struct.Struct("<fHI")
LENGTHS = np.dtype([("coded", "<u4"), ("exceptions", "<u4")])
# Integers have 32 bits; some room is left for the rounding of the quotient.
LARGEST_SYMBOL = 2.0**30


@dataclass(frozen=True, eq=False)
class TokenClasses:
    """How fine the tokens of a block are relative to each other.

    Attributes:
        classes: int64 `[n]`, from LOWEST_CLASS to HIGHEST_CLASS; sinks have one too, which nobody looks at.
        sinks: how many of the first tokens are sent in the 16-bit dtype.
    """

    classes: np.ndarray
    sinks: int

    @cached_property
    def coded(self) -> np.ndarray:
        """uint8 `[n − sinks]`: classes of the tokens that have a step, from 0."""
        return (self.classes[self.sinks :] - LOWEST_CLASS).astype(np.uint8)

    @cached_property
    def order(self) -> np.ndarray:
        """int64 `[n − sinks]`: tokens that have a step, counted from the first of them, by rising class."""
        return np.argsort(self.coded, kind="stable")

    @cached_property
    def of_each(self) -> np.ndarray:
        """int64 `[classes]`: how many of these tokens each class has."""
        return np.bincount(self.coded, minlength=len(STEP_CLASSES))

    @cached_property
    def start(self) -> np.ndarray:
        """int64 `[classes + 1]`: the first place of each class in `order`."""
        return edges(self.of_each)


@dataclass(frozen=True, eq=False)
class Steps:
    """The steps of a block's tokens.

    Attributes:
        base: binary logarithm of the step of class 0; a float32, as the body has it.
        tokens: the tokens' classes.
    """

    base: float
    tokens: TokenClasses

    @property
    def of_classes(self) -> np.ndarray:
        """float32: the step of each class."""
        return np.exp2(self.base + STEP_CLASSES / CLASSES_PER_OCTAVE).astype(np.float32)

    def packed(self, transform: LayerTransform) -> PackedStreams:
        """How the block's streams are packed."""
        return transform.streams.packed(self.tokens.of_each, self.base)


@dataclass(frozen=True, eq=False)
class AnalysedBlock:
    """A run of tokens of one layer, ready to be coded with any base step.

    Attributes:
        transform: of the layer.
        first: position of the first token.
        keys: `[kv_heads, n, head_dim]` on the CPU, after the rotary embedding.
        values: like `keys`.
        tokens: the tokens' classes.
        coefficients: float32 `[2 · kv_heads, head_dim, n − sinks]`, tokens by rising class.
        largest: the largest magnitude of a coefficient; finite.
    """

    transform: LayerTransform
    first: int
    keys: torch.Tensor
    values: torch.Tensor
    tokens: TokenClasses
    coefficients: torch.Tensor
    largest: float

    @classmethod
    def of(
        cls,
        transform: LayerTransform,
        first: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        tokens: TokenClasses,
    ) -> "AnalysedBlock":
        """Analyse a run of tokens.

        Raises:
            InvalidArgumentError: an element is infinite or NaN.
        """
        sinks = tokens.sinks
        coefficients = transform.analyse(keys[:, sinks:], values[:, sinks:], first + sinks, tokens.order)
        largest = 0.0
        if coefficients.numel():
            low, high = coefficients.aminmax()
            largest = max(-float(low), float(high))
        if not largest < math.inf:
            raise InvalidArgumentError(f"keys or values of layer {transform.layer} are infinite or NaN")
        return cls(transform, first, keys, values, tokens, coefficients, largest)

    @property
    def length(self) -> int:
        """How many tokens."""
        return self.keys.shape[1]

    @property
    def finest_base(self) -> float:
        """The least base step at which all integers have 32 bits, whatever their tokens' classes."""
        return math.log2(max(self.largest, 1e-30) / LARGEST_SYMBOL) - LOWEST_CLASS / CLASSES_PER_OCTAVE

    def halves(self) -> "Iterator[AnalysedBlock]":
        """Yield the first half of the tokens and the others."""
        half = self.length // 2
        for start, end in ((0, half), (half, self.length)):
            classes, sinks = self.tokens.classes[start:end], min(max(0, self.tokens.sinks - start), end - start)
            yield AnalysedBlock.of(
                self.transform,
                self.first + start,
                self.keys[:, start:end],
                self.values[:, start:end],
                TokenClasses(classes, sinks),
            )


def encode_block(block: AnalysedBlock, base: float, geometry: KvGeometry) -> bytearray:
    """Code a run of tokens.

    Args:
        block: the tokens.
        base: binary logarithm of the step of class 0, a float32; not below the block's finest.
        geometry: shape and dtype of the model's cache.

    Raises:
        InvalidArgumentError: a sink does not fit the 16-bit dtype.
    """
    steps, sinks = Steps(base, block.tokens), slice(0, block.tokens.sinks)
    exact = torch.stack([block.keys[:, sinks], block.values[:, sinks]]).to(geometry.half_dtype).contiguous()
    if not exact.isfinite().all():
        raise InvalidArgumentError(
            f"keys or values of the first tokens in layer {block.transform.layer} do not fit {geometry.half_dtype}"
        )
    coded_classes = compress(block.tokens.coded)
    coded = _coded_streams(block, steps) if len(block.tokens.coded) else []
    lengths = np.array([(len(one.coded), one.exception_count) for one in coded], LENGTHS)
    parts: list[bytes | memoryview] = [
        HEADER.pack(base, block.tokens.sinks, len(coded_classes)),
        exact.view(torch.uint8).numpy().tobytes(),
        coded_classes,
        lengths.tobytes(),
    ]
    for one in coded:
        parts += one
    parts.append(b"\0" * (sum(map(len, parts)) % 2))
    return bytearray().join(parts)


def _coded_streams(block: AnalysedBlock, steps: Steps) -> list[CodedStream]:
    """Code the tokens that have a step."""
    transform, packed = block.transform, steps.packed(block.transform)
    symbols = np.empty(packed.start[-1], np.int32)
    kernels.quantize(
        block.coefficients.flatten(0, 1).numpy(),
        transform.row_order,
        transform.run_start,
        block.tokens.start,
        1 / steps.of_classes,
        transform.streams.stream_of,
        packed.start[:-1].copy(),
        symbols,
    )
    return packed.encode(symbols)


def decode_block(
    transform: LayerTransform,
    body: memoryview,
    first: int,
    geometry: KvGeometry,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> Steps:
    """Inverse of `encode_block`.

    Args:
        transform: of the layer.
        body: as it arrived.
        first: position of the first token.
        geometry: shape and dtype of the model's cache.
        keys: `[kv_heads, n, head_dim]` in the model's own dtype, any strides, on any device; written.
        values: like `keys`.

    Returns:
        The tokens' steps.

    Raises:
        DataLossError: the body does not hold what its header says.
    """
    reader, tokens = _Reader(body), keys.shape[1]
    base, sinks, class_bytes = reader.header()
    if sinks > tokens:
        raise DataLossError(f"a block of {tokens} tokens has {sinks} sinks", "malformed")
    shape = (2, geometry.kv_heads, sinks, geometry.head_dim)
    exact = reader.array(2 * int(np.prod(shape)), np.uint8)
    classes = decompress(reader.take(class_bytes), tokens - sinks).astype(np.int64)
    if len(classes) and classes.max() > HIGHEST_CLASS - LOWEST_CLASS:
        raise DataLossError(f"a block has the step class {classes.max() + LOWEST_CLASS}", "malformed")
    of_tokens = np.concatenate([np.zeros(sinks, np.int64), classes + LOWEST_CLASS])
    steps = Steps(base, TokenClasses(of_tokens, sinks))
    if sinks:
        states = torch.from_numpy(exact.copy()).view(geometry.half_dtype).view(shape)
        keys[:, :sinks], values[:, :sinks] = states[0], states[1]
    if len(classes):
        coefficients = _read_coefficients(reader, steps, transform, geometry)
        order = steps.tokens.order
        transform.synthesise(coefficients, first + sinks, order, keys[:, sinks:], values[:, sinks:])
    reader.finish()
    return steps


def _read_coefficients(
    reader: "_Reader", steps: Steps, transform: LayerTransform, geometry: KvGeometry
) -> torch.Tensor:
    """Coefficients of the tokens that have a step: float32 `[2 · kv_heads, head_dim, n]`, tokens by rising class."""
    packed = steps.packed(transform)
    lengths = reader.array(len(packed.limit), LENGTHS).tolist()
    symbols = packed.decode(
        [
            CodedStream(reader.take(coded), reader.take(raw_bytes), reader.take(exceptions * EXCEPTION.itemsize))
            for (coded, exceptions), raw_bytes in zip(lengths, packed.raw_bytes.tolist(), strict=True)
        ]
    )
    coefficients = torch.empty(2 * geometry.kv_heads, geometry.head_dim, len(steps.tokens.coded))
    kernels.dequantize(
        symbols,
        transform.row_order,
        transform.run_start,
        steps.tokens.start,
        steps.of_classes,
        transform.streams.stream_of,
        packed.start[:-1].copy(),
        coefficients.flatten(0, 1).numpy(),
    )
    return coefficients


class _Reader:
    """Takes a body apart, front to back."""

    def __init__(self, body: memoryview) -> None:
        self._body = body
        self._position = 0

    def take(self, size: int) -> memoryview:
        end = self._position + size
        if end > len(self._body):
            raise DataLossError(f"a block's body of {len(self._body)} bytes is cut off; {end} are needed", "length")
        taken = self._body[self._position : end]
        self._position = end
        return taken

    def header(self) -> tuple[float, int, int]:
        base, sinks, class_bytes = HEADER.unpack(self.take(HEADER.size))
        if not -64 <= base <= 64:
            raise DataLossError(f"a block's steps have the exponent {base}", "scale")
        return base, sinks, class_bytes

    def array(self, count: int, dtype: np.dtype | type) -> np.ndarray:
        return np.frombuffer(self.take(count * np.dtype(dtype).itemsize), dtype)

    def finish(self) -> None:
        if len(self._body) - self._position > 1:
            raise DataLossError(f"a block's body has {len(self._body) - self._position} bytes too many", "length")
