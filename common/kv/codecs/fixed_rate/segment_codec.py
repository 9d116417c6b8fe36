"""One layer's tokens to bytes; the layout of a body is documented at `KvChunk` in kv.proto."""

import struct
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.kv.codecs.fixed_rate.statistics import SegmentStatistics
from spectrumkv.common.kv.codecs.fixed_rate.transform import LayerTransform
from spectrumkv.kernels.fixed_rate.dispatch import pack
from spectrumkv.kernels.fixed_rate.layout import PROFILE_OF_BYTE, RecordLayout, token_bytes
from spectrumkv.kernels.fixed_rate.quantizer import escape_limits

# Base step, exponent of the largest standard deviation, sinks, whose scales they are, the token from which on steps
# are coarser, escapes.
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


@dataclass(frozen=True)
class SegmentSpan:
    """A run of tokens of one layer that is coded together.

    Attributes:
        first: position of the first token.
        sinks: how many of its first tokens are sent without the transform.
        coded: how many others there are.
        own: whether it has scales of its own.
    """

    first: int
    sinks: int
    coded: int
    own: bool

    @property
    def length(self) -> int:
        """Count the tokens, sinks included."""
        return self.sinks + self.coded

    @property
    def first_coded(self) -> int:
        """Return the position of the first token that is no sink."""
        return self.first + self.sinks

    @property
    def end(self) -> int:
        """Return the position after the last token."""
        return self.first + self.length

    def fixed_bytes(self, rows: int) -> int:
        """Count the body's bytes without records and escapes.

        Args:
            rows: coefficients of a token.

        Returns:
            Bytes.
        """
        scales = 2 * rows if self.own else 0
        return HEADER.size + 2 * rows * self.sinks + scales + padded(self.coded)


@dataclass(frozen=True, eq=False)
class UncodedSegment:
    """A run of tokens of one layer that is to be coded.

    Attributes:
        transform: of the layer.
        span: the tokens.
        sinks: uint8 `[b]`, its sinks, coded.
        coefficients: float32 `[n, rows]`, of the tokens after them.
        classes: int64 `[n]`, their step classes.
        statistics: of the coefficients; None where there is no token but sinks.
    """

    transform: LayerTransform
    span: SegmentSpan
    sinks: np.ndarray
    coefficients: torch.Tensor
    classes: np.ndarray
    statistics: SegmentStatistics | None

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

    def layout(self, steps: LayerSteps) -> RecordLayout | None:
        """Return the layout of the records at a layer's steps; None where there are none."""
        if self.statistics is None:
            return None
        return RecordLayout.of(self.statistics.scales, self.tokens, steps.base, self.turn(steps))

    def header(self, steps: LayerSteps, escapes: int) -> bytes:
        """Return the header of the body at a layer's steps, with a number of escapes."""
        statistics = self.statistics
        if statistics is None:
            return HEADER.pack(0, 0, self.span.sinks, CALIBRATED, 0, 0)
        top = statistics.scales.top - (0 if self.span.own else self.transform.calibrated.top)
        kind = OWN if self.span.own else CALIBRATED
        return HEADER.pack(steps.base, top, self.span.sinks, kind, self.turn(steps), escapes)

    def turn(self, steps: LayerSteps) -> int:
        """Return the first of the tokens after the sinks that has the coarser base."""
        return min(max(0, steps.turn - self.span.first_coded), self.span.coded)


@dataclass(frozen=True, eq=False)
class CodedBody:
    """The body of a segment.

    Attributes:
        body: the bytes.
        layout: of its records; None where there are none.
        escapes: how many there are.
    """

    body: bytearray
    layout: RecordLayout | None
    escapes: int


def encode_segment(segment: UncodedSegment, steps: LayerSteps) -> CodedBody:
    """Code a run of tokens.

    Args:
        segment: the tokens.
        steps: of the layer.

    Returns:
        The body.

    Raises:
        InvalidArgumentError: an element is too large for the codec.
    """
    layout, statistics = segment.layout(steps), segment.statistics
    if layout is None or statistics is None:
        return CodedBody(bytearray().join([segment.header(steps, 0), segment.sinks.data]), None, 0)
    scales = statistics.scales
    limits = torch.from_numpy(escape_limits(layout))
    records = pack(segment.coefficients, scales, torch.from_numpy(segment.tokens), layout, limits)
    escapes = records.escape_value
    check_escapes(segment.transform.layer, escapes)
    parts = [
        segment.header(steps, len(escapes)),
        segment.sinks.data,
        *((scales.drops.data, scales.means.view(np.uint8).data) if segment.span.own else ()),
        segment.tokens.data,
        bytes(padded(len(segment.tokens)) - len(segment.tokens)),
        records.words.numpy().data,
        records.escape_index.numpy().data,
        escapes.numpy().view(np.uint8).data,
    ]
    return CodedBody(bytearray().join(parts), layout, len(escapes))


def padded(length: int) -> int:
    """Return a number of bytes, rounded up to whole words."""
    return -(-length // WORD_BYTES) * WORD_BYTES


def check_escapes(layer: int, values: torch.Tensor) -> None:
    """Refuse coefficients that are too large to be sent as they are.

    Args:
        layer: of the segment.
        values: float32 `[e]`, its escapes.

    Raises:
        InvalidArgumentError: one is.
    """
    if not bool((values.abs() < LARGEST_ESCAPE).all()):
        raise InvalidArgumentError(
            f"keys or values of layer {layer} have coefficients of {float(values.abs().max()):g}; "
            f"codec fixed_rate has those up to {LARGEST_ESCAPE:g}"
        )
