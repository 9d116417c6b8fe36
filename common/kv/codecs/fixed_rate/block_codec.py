"""One layer's tokens to bytes and back; the layout of a body is documented at `KvChunk` in kv.proto."""

import math
import struct
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from spectrumkv.common.errors import DataLossError, InvalidArgumentError
from spectrumkv.common.kv.codecs.fixed_rate.statistics import LARGEST_EXPONENT, BlockStatistics, calibrated_scales
from spectrumkv.common.kv.codecs.fixed_rate.transform import LayerTransform
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.kernels.fixed_rate.block import Records
from spectrumkv.kernels.fixed_rate.dispatch import pack, synthesise
from spectrumkv.kernels.fixed_rate.layout import PROFILE_OF_BYTE, RecordLayout, RowScales, token_bytes
from spectrumkv.kernels.fixed_rate.quantizer import escape_limits

# Base step, exponent of the largest spread, sinks, whose scales they are, the token from which on steps are coarser,
# escapes.
HEADER = struct.Struct("<hhHHII")
CALIBRATED, OWN = 0, 1
WORD_BYTES = 4
ESCAPE_BYTES = 8
# Largest magnitude of a coefficient that is sent as it is.
LARGEST_ESCAPE = 2.0**80


@dataclass(frozen=True)
class LayerSteps:
    """How fine the steps of a layer are.

    Attributes:
        base: binary logarithm of the step of class 0, in 64ths of an octave, for tokens before `turn`; that of the
            others is one more.
        turn: a position in the prompt.
    """

    base: int
    turn: int


@dataclass(frozen=True, eq=False)
class Block:
    """A run of tokens of one layer that is to be coded.

    Attributes:
        transform: of the layer.
        first: position of the first token.
        sinks: uint8, the first tokens' keys, then their values, in the 16-bit dtype.
        sink_count: how many those are.
        coefficients: float32 `[n, rows]`, of the tokens after them.
        classes: int64 `[n]`, their step classes.
        statistics: of the coefficients; None where there is no token but sinks.
    """

    transform: LayerTransform
    first: int
    sinks: np.ndarray
    sink_count: int
    coefficients: torch.Tensor
    classes: np.ndarray
    statistics: BlockStatistics | None

    @property
    def length(self) -> int:
        """Count the tokens, sinks included."""
        return self.sink_count + len(self.classes)

    @cached_property
    def tokens(self) -> np.ndarray:
        """Return class and gain of each token that is no sink: uint8 `[n]`."""
        if self.statistics is None:
            return np.empty(0, np.uint8)
        return token_bytes(self.classes, self.statistics.gains)

    @cached_property
    def profiles(self) -> np.ndarray:
        """Return the profiles of the tokens that are no sinks, counted from 0: int64 `[n]`."""
        profiles: np.ndarray = PROFILE_OF_BYTE[self.tokens]
        return profiles

    @property
    def fixed_bytes(self) -> int:
        """Count the body's bytes without records and escapes."""
        own = self.statistics is not None and self.statistics.own
        scales = 2 * self.transform.rows if own else 0
        return HEADER.size + len(self.sinks) + scales + _padded(len(self.tokens))

    def layout(self, steps: LayerSteps) -> RecordLayout | None:
        """Return the layout of the records at a layer's steps; None where there are none."""
        if self.statistics is None:
            return None
        return RecordLayout.of(self.statistics.scales, self.tokens, steps.base, self.turn(steps))

    def turn(self, steps: LayerSteps) -> int:
        """Return the first of the tokens after the sinks that has the coarser base."""
        return min(max(0, steps.turn - self.first - self.sink_count), len(self.classes))


@dataclass(frozen=True, eq=False)
class CodedBlock:
    """The body of a block.

    Attributes:
        body: the bytes.
        layout: of its records; None where there are none.
        escapes: how many there are.
    """

    body: bytearray
    layout: RecordLayout | None
    escapes: int


def encode_block(block: Block, steps: LayerSteps) -> CodedBlock:
    """Code a run of tokens.

    Args:
        block: the tokens.
        steps: of the layer.

    Returns:
        The body.

    Raises:
        InvalidArgumentError: an element is too large for the codec.
    """
    layout, statistics = block.layout(steps), block.statistics
    if layout is None or statistics is None:
        header = HEADER.pack(0, 0, block.sink_count, CALIBRATED, 0, 0)
        return CodedBlock(bytearray().join([header, block.sinks.data]), None, 0)
    scales = statistics.scales
    limits = torch.from_numpy(escape_limits(layout))
    records = pack(block.coefficients, scales, torch.from_numpy(block.tokens), layout, limits)
    escapes = records.escape_value
    if not bool((escapes.abs() < LARGEST_ESCAPE).all()):
        raise InvalidArgumentError(
            f"keys or values of layer {block.transform.layer} have coefficients of {float(escapes.abs().max()):g}; "
            f"codec fixed_rate has those up to {LARGEST_ESCAPE:g}"
        )
    top = scales.top if statistics.own else scales.top - block.transform.calibrated.top
    kind = OWN if statistics.own else CALIBRATED
    parts = [
        HEADER.pack(steps.base, top, block.sink_count, kind, block.turn(steps), len(escapes)),
        block.sinks.data,
        *((scales.drops.data, scales.means.view(np.uint8).data) if statistics.own else ()),
        block.tokens.data,
        bytes(_padded(len(block.tokens)) - len(block.tokens)),
        records.words.numpy().data,
        records.escape_index.numpy().data,
        escapes.numpy().view(np.uint8).data,
    ]
    return CodedBlock(bytearray().join(parts), layout, len(escapes))


def decode_block(
    transform: LayerTransform,
    body: torch.Tensor,
    first: int,
    geometry: KvGeometry,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> tuple[RecordLayout | None, int]:
    """Decode a run of tokens: the inverse of `encode_block`.

    Args:
        transform: of the layer.
        body: uint8 `[b]` as it arrived.
        first: position of the first token.
        geometry: shape and dtype of the model's cache.
        keys: `[kv_heads, n, head_dim]` in the model's own dtype, any strides, on any device; written.
        values: like `keys`.

    Returns:
        The layout of the records, None where there are none, and the number of sinks.

    Raises:
        DataLossError: the body does not hold what its header says.
    """
    reader, tokens = _Reader(body), keys.shape[1]
    base, top, sinks, kind, turn, escapes = reader.header()
    if sinks > tokens or kind not in (CALIBRATED, OWN):
        raise DataLossError(f"a segment of {tokens} tokens has {sinks} sinks and scales of kind {kind}", "malformed")
    if sinks:
        shape = (2, geometry.kv_heads, sinks, geometry.head_dim)
        states = reader.take(2 * math.prod(shape)).clone().view(geometry.half_dtype).view(shape)
        keys[:, :sinks], values[:, :sinks] = states[0], states[1]
    if sinks == tokens:
        reader.finish()
        return None, sinks
    scales = _scales(reader, transform, top, own=kind == OWN)
    of_tokens = reader.take(tokens - sinks)
    reader.take(_padded(tokens - sinks) - (tokens - sinks))
    layout = RecordLayout.of(scales, of_tokens.numpy(), base, turn)
    records = Records(
        reader.take(WORD_BYTES * layout.words),
        reader.take(WORD_BYTES * escapes),
        reader.take(WORD_BYTES * escapes).clone().view(torch.float32),
    )
    reader.finish()
    _check_escapes(records, (tokens - sinks) * transform.rows)
    synthesis = transform.synthesis(first + sinks, tokens - sinks)
    synthesise(records, scales, of_tokens, layout, synthesis, keys[:, sinks:], values[:, sinks:])
    return layout, sinks


def _scales(reader: "_Reader", transform: LayerTransform, top: int, own: bool) -> RowScales:
    """Return the rows' scales: sent, or the calibrated ones, moved.

    Raises:
        DataLossError: spreads are beyond what bodies may have.
    """
    if own:
        drops, means = reader.take(transform.rows).numpy(), reader.take(transform.rows).numpy().view(np.int8)
        scales = RowScales(top, drops, means)
    else:
        scales = calibrated_scales(transform.std, top)
    if abs(scales.top) > LARGEST_EXPONENT:
        raise DataLossError(f"a segment's largest spread has the exponent {scales.top} / 8", "scale")
    return scales


def _check_escapes(records: Records, symbols: int) -> None:
    """Refuse escapes that do not rise, lie outside the block, or are no sensible numbers.

    Raises:
        DataLossError: some do.
    """
    index = np.frombuffer(records.escape_index.numpy().tobytes(), "<u4").astype(np.int64)
    if len(index) and (index[-1] >= symbols or bool((np.diff(index) <= 0).any())):
        raise DataLossError(f"the indices of {len(index)} escapes do not rise within {symbols} symbols", "malformed")
    if not bool((records.escape_value.abs() < LARGEST_ESCAPE).all()):
        raise DataLossError("a coefficient that was sent as it is has no finite value", "scale")


def _padded(length: int) -> int:
    return -(-length // WORD_BYTES) * WORD_BYTES


class _Reader:
    """A body that is taken apart, front to back."""

    def __init__(self, body: torch.Tensor) -> None:
        self._body = body
        self._position = 0

    def take(self, size: int) -> torch.Tensor:
        end = self._position + size
        if end > self._body.numel():
            raise DataLossError(
                f"a segment's body of {self._body.numel()} bytes is cut off; {end} are needed", "length"
            )
        taken = self._body[self._position : end]
        self._position = end
        return taken

    def header(self) -> tuple[int, int, int, int, int, int]:
        return HEADER.unpack(self.take(HEADER.size).numpy().data)

    def finish(self) -> None:
        if self._position != self._body.numel():
            raise DataLossError(
                f"a segment's body has {self._body.numel() - self._position} bytes too many", "length"
            )
