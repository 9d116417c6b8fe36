"""One layer's tokens to bytes and back.

Body of codec "spectral", version 1, all integers little-endian:

  offset  size  field
       0     4  base: float32, binary logarithm of the step of class 0
       4     2  number of sinks s: the block's first tokens, sent in the model's 16-bit dtype
       6     2  zero
       8     4  length of the coded step classes
      12     …  sinks: keys [H, s, d] then values [H, s, d], after the rotary embedding
       …     …  coded step classes: one byte for each other token, class − LOWEST_CLASS
       …     …  for each stream, from the narrowest to the widest: 4 bytes its coded length, the coded packed symbols,
                the raw bits, 4 bytes its number of exceptions, and the exceptions (index and value, 4 bytes each)
       …   0–1  a zero byte where the length would be odd

What is coded is described in `symbols`, which symbols are in which stream in `layout`.
"""

import struct
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch

from spectrumkv.common.errors import DataLossError
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.spectral.basis import SpectralBasis
from spectrumkv.common.kv.spectral.layout import (
    CLASSES_PER_OCTAVE,
    Run,
    relative_spread,
    runs,
    spread_classes,
    streams,
)
from spectrumkv.common.kv.spectral.rotary import rotate
from spectrumkv.common.kv.spectral.symbols import (
    EXCEPTION,
    compress,
    decompress,
    join_raw_bits,
    pack,
    packing_for,
    raw_bytes,
    split_raw_bits,
    unpack,
)

HEADER = struct.Struct("<fHHI")
LENGTH = struct.Struct("<I")
# Step classes in half octaves around the mean token: three octaves finer, one and a half coarser.
LOWEST_CLASS, HIGHEST_CLASS = -6, 3


@dataclass(frozen=True, eq=False)
class LayerTransform:
    """The basis of one layer, with its coefficients sorted by spread class.

    Attributes:
        basis: of the model.
        layer: from 0.
    """

    basis: SpectralBasis
    layer: int

    @cached_property
    def order(self) -> torch.Tensor:
        """int64 `[2 · kv_heads · head_dim]`: coefficients by rising class."""
        return torch.from_numpy(np.argsort(self.classes_unsorted, kind="stable"))

    @cached_property
    def classes_unsorted(self) -> np.ndarray:
        """Spread class of each coefficient, in the order side, head, element."""
        return spread_classes(self.basis.spread[self.layer].flatten().numpy())

    @cached_property
    def columns(self) -> list[Run]:
        """Runs of equal class among the sorted coefficients."""
        return runs(np.sort(self.classes_unsorted))

    def analyse(self, keys: torch.Tensor, values: torch.Tensor, first: int) -> torch.Tensor:
        """Coefficients of tokens at positions `first` and up.

        Args:
            keys: `[kv_heads, n, head_dim]`, after the rotary embedding.
            values: like `keys`.
            first: position of the first token.

        Returns:
            float32 `[n, 2 · kv_heads · head_dim]`, columns in `order`.
        """
        basis, tokens = self.basis, keys.shape[1]
        cosine, sine = basis.rotation(first, tokens)
        states = torch.cat([rotate(keys.float(), cosine, -sine).div_(basis.rope_scaling), values.float()])
        analysis = basis.analysis[self.layer].flatten(0, 1)
        offset = -basis.mean[self.layer].flatten(0, 1)[:, None] @ analysis
        coefficients = torch.baddbmm(offset, states, analysis)
        return coefficients.transpose(0, 1).reshape(tokens, -1)[:, self.order]

    def synthesise(self, coefficients: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inverse of `analyse`: keys after the rotary embedding, and values, float32 `[kv_heads, n, head_dim]`."""
        basis, tokens = self.basis, coefficients.shape[0]
        _, sides, kv_heads, head_dim = basis.mean.shape
        unsorted = torch.empty_like(coefficients)
        unsorted[:, self.order] = coefficients
        by_head = unsorted.view(tokens, sides * kv_heads, head_dim).transpose(0, 1)
        mean = basis.mean[self.layer].flatten(0, 1)[:, None]
        states = torch.baddbmm(mean, by_head, basis.synthesis[self.layer].flatten(0, 1))
        cosine, sine = basis.rotation(first, tokens)
        return rotate(states[:kv_heads], cosine, sine).mul_(basis.rope_scaling), states[kv_heads:]


@lru_cache(maxsize=8)
def layer_transforms(basis: SpectralBasis) -> tuple[LayerTransform, ...]:
    """The transforms of all layers; requests that use one basis share them."""
    return tuple(LayerTransform(basis, layer) for layer in range(basis.mean.shape[0]))


@dataclass(frozen=True)
class Steps:
    """The steps of a block's tokens.

    Attributes:
        base: binary logarithm of the step of class 0; a float32, as the body has it.
        classes: int64 `[n]`, from LOWEST_CLASS to HIGHEST_CLASS; sinks have one too, which nobody looks at.
        sinks: how many of the first tokens are sent in the 16-bit dtype.
    """

    base: float
    classes: np.ndarray
    sinks: int

    def of_tokens(self, classes: np.ndarray) -> torch.Tensor:
        """Step of each class: float32, a column."""
        return torch.from_numpy(np.exp2(self.base + classes / CLASSES_PER_OCTAVE).astype(np.float32))[:, None]


def encode_block(
    transform: LayerTransform,
    keys: torch.Tensor,
    values: torch.Tensor,
    first: int,
    steps: Steps,
    geometry: KvGeometry,
) -> bytes:
    """Code a run of tokens of one layer.

    Args:
        transform: of the layer.
        keys: `[kv_heads, n, head_dim]` on the CPU, after the rotary embedding; finite.
        values: like `keys`.
        first: position of the first token.
        steps: of the tokens.
        geometry: shape and dtype of the model's cache.
    """
    sinks = steps.sinks
    sink_states = torch.stack([keys[:, :sinks], values[:, :sinks]]).to(geometry.half_dtype).contiguous()
    classes = steps.classes[sinks:]
    coded_classes = compress((classes - LOWEST_CLASS).astype(np.uint8))
    parts = [
        HEADER.pack(steps.base, sinks, 0, len(coded_classes)),
        sink_states.view(torch.uint8).numpy().tobytes(),
        coded_classes,
    ]
    if len(classes):
        order = np.argsort(classes, kind="stable")
        coefficients = transform.analyse(keys[:, sinks:], values[:, sinks:], first + sinks)
        scaled = coefficients[torch.from_numpy(order)].div_(steps.of_tokens(classes[order]))
        symbols = scaled.round_().to(torch.int32).numpy()
        for stream, rectangles in streams(runs(classes[order]), transform.columns):
            packing = packing_for(relative_spread(stream, steps.base))
            pieces = [symbols[row.start : row.end, column.start : column.end].ravel() for row, column in rectangles]
            high, raw = split_raw_bits(np.concatenate(pieces), packing)
            packed, exceptions = pack(high, packing)
            coded = compress(packed)
            parts += [LENGTH.pack(len(coded)), coded, raw, LENGTH.pack(len(exceptions)), exceptions.tobytes()]
    body = b"".join(parts)
    return body + b"\0" * (len(body) % 2)


def decode_block(
    transform: LayerTransform, body: memoryview, tokens: int, first: int, geometry: KvGeometry
) -> tuple[torch.Tensor, torch.Tensor, Steps]:
    """Inverse of `encode_block`.

    Returns:
        Keys and values, `[kv_heads, tokens, head_dim]` in the model's own dtype, on the CPU, and the tokens' steps.

    Raises:
        DataLossError: the body does not hold what its header says.
    """
    reader = _Reader(body)
    base, sinks, _, class_bytes = reader.header()
    if sinks > tokens:
        raise DataLossError(f"a block of {tokens} tokens has {sinks} sinks", "malformed")
    shape = (2, geometry.kv_heads, sinks, geometry.head_dim)
    sink_states = reader.array(2 * int(np.prod(shape)), np.uint8)
    classes = decompress(reader.take(class_bytes), tokens - sinks).astype(np.int64) + LOWEST_CLASS
    if len(classes) and not (classes.min() >= LOWEST_CLASS and classes.max() <= HIGHEST_CLASS):
        raise DataLossError(f"a block has step classes up to {classes.max()}", "malformed")
    keys = torch.empty(geometry.kv_heads, tokens, geometry.head_dim, dtype=geometry.native_dtype)
    values = torch.empty_like(keys)
    if sinks:
        exact = torch.from_numpy(sink_states.copy()).view(geometry.half_dtype).view(shape)
        keys[:, :sinks], values[:, :sinks] = exact[0], exact[1]
    if len(classes):
        order = np.argsort(classes, kind="stable")
        symbols = _read_symbols(reader, runs(classes[order]), transform, base)
        steps = Steps(base, classes, sinks).of_tokens(classes[order])
        coefficients = torch.empty(len(classes), symbols.shape[1])
        coefficients[torch.from_numpy(order)] = torch.from_numpy(symbols).float().mul_(steps)
        keys[:, sinks:], values[:, sinks:] = transform.synthesise(coefficients, first + sinks)
    reader.finish()
    return keys, values, Steps(base, np.concatenate([np.zeros(sinks, np.int64), classes]), sinks)


def _read_symbols(reader: "_Reader", rows: list[Run], transform: LayerTransform, base: float) -> np.ndarray:
    """The matrix of symbols, rows and columns sorted by class."""
    width = transform.columns[-1].end
    symbols = np.empty((rows[-1].end, width), np.int32)
    for stream, rectangles in streams(rows, transform.columns):
        packing = packing_for(relative_spread(stream, base))
        sizes = [(row.end - row.start) * (column.end - column.start) for row, column in rectangles]
        count = sum(sizes)
        packed_bytes = -(-count // packing.per_byte) if packing.per_byte else 0
        packed = decompress(reader.take(reader.length()), packed_bytes)
        high = unpack(packed, count, packing).astype(np.int32)
        raw = reader.array(raw_bytes(count, packing), np.uint8)
        exceptions = reader.array(reader.length(), EXCEPTION)
        if len(exceptions) and int(exceptions["index"].max()) >= count:
            raise DataLossError(f"an exception lies outside its stream of {count} symbols", "malformed")
        high[exceptions["index"]] = exceptions["value"]
        flat = join_raw_bits(high, raw, packing)
        for (row, column), piece in zip(rectangles, np.split(flat, np.cumsum(sizes)[:-1]), strict=True):
            block = piece.reshape(row.end - row.start, -1)
            symbols[row.start : row.end, column.start : column.end] = block
    return symbols


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

    def header(self) -> tuple[float, int, int, int]:
        base, sinks, reserved, class_bytes = HEADER.unpack(self.take(HEADER.size))
        if not -64 <= base <= 64:
            raise DataLossError(f"a block's steps have the exponent {base}", "scale")
        return base, sinks, reserved, class_bytes

    def length(self) -> int:
        size: int = LENGTH.unpack(self.take(LENGTH.size))[0]
        return size

    def array(self, count: int, dtype: np.dtype | type) -> np.ndarray:
        return np.frombuffer(self.take(count * np.dtype(dtype).itemsize), dtype)

    def finish(self) -> None:
        if len(self._body) - self._position > 1:
            raise DataLossError(f"a block's body has {len(self._body) - self._position} bytes too many", "length")
