"""Streams of integers to bytes: packed so that one byte has several bits of entropy, then coded.

The Huffman stage of Zstandard is within a few percent of the entropy of bytes that are alike and take 4 bits or more,
at a gigabyte a second. Narrow symbols are therefore packed several to a byte first, the narrowest as gaps between
those that are not 0; wide ones give up their lowest bits, which are noise, and send those as they are.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import local
from typing import NamedTuple

import numpy as np
import zstandard

from spectrumkv.common.errors import DataLossError
from spectrumkv.kernels.spectral import packing as kernels
from spectrumkv.kernels.spectral.packing import GAPS
from spectrumkv.kernels.spectral.stream_layout import lay_out, make_frames


@dataclass(frozen=True)
class Packing:
    """A way in which the symbols of a stream share bytes.

    Attributes:
        per_byte: symbols in one byte; `GAPS` where bytes are gaps, 0 where the stream is not sent at all.
        limit: largest magnitude; larger symbols are exceptions, sent separately.
        widest: exponent of two, in steps, of the standard deviation up to which this packing is used.
    """

    per_byte: int
    limit: int
    widest: float

    @property
    def base(self) -> int:
        """Count the values of one symbol."""
        return 2 * self.limit + 1


# Limits lie at more than 4 standard deviations: coefficients have heavy tails, and an exception costs 8 bytes.
PACKINGS = (
    Packing(per_byte=0, limit=0, widest=-4.0),
    Packing(per_byte=GAPS, limit=1, widest=-1.5),
    Packing(per_byte=3, limit=2, widest=-1.0),
    Packing(per_byte=2, limit=7, widest=0.75),
    Packing(per_byte=1, limit=127, widest=math.inf),
)
_WIDEST = np.array([one.widest for one in PACKINGS])
_PER_BYTE = np.array([one.per_byte for one in PACKINGS], np.int64)
_LIMITS = np.array([one.limit for one in PACKINGS], np.int64)
# Exponent of the standard deviation above which the lowest bits are split off.
WIDEST_WITHOUT_RAW_BITS = 4.75
# Exponent up to which a stream has a frame of its own. A frame has a table of a hundred bytes, and the wide streams
# are many and short.
WIDEST_APART = WIDEST_WITHOUT_RAW_BITS - 1
# Compiled loops move 32 bits at once; no model has standard deviations beyond 2^28 steps.
MOST_RAW_BITS = 24
# First byte of a frame that says nothing of its size: one that does would be given as much memory as it says.
PLAIN_FRAME = 0
LARGEST_WINDOW_BYTES = 1 << 20
EXCEPTION = np.dtype([("index", "<u4"), ("value", "<i4")])

# What saves bytes here is Zstandard's Huffman coder. Symbols are noise, in which a search finds little but what costs
# more to say: with the smallest table there are fewer bytes, in less time.
_COMPRESSION = zstandard.ZstdCompressionParameters.from_level(
    1,
    format=zstandard.FORMAT_ZSTD1_MAGICLESS,
    write_content_size=False,
    write_checksum=False,
    min_match=7,
    hash_log=6,
)


class _Coders(local):
    """Zstandard's state of one thread."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(compression_params=_COMPRESSION)
        self.decompressor = zstandard.ZstdDecompressor(
            format=zstandard.FORMAT_ZSTD1_MAGICLESS, max_window_size=LARGEST_WINDOW_BYTES
        )


_coders = _Coders()


class CodedStreams(NamedTuple):
    """The streams of a segment in bytes.

    Attributes:
        gap_bytes: length of each frame of gaps before it was coded; these frames come first.
        frames: packed symbols, as `compress` leaves them.
        raw: lowest bits.
        exceptions: of `EXCEPTION`, one after another, by rising index.
    """

    gap_bytes: Sequence[int]
    frames: Sequence[bytes | memoryview]
    raw: bytes | memoryview
    exceptions: bytes | memoryview


@dataclass(frozen=True, eq=False)
class PackedStreams:
    """The streams of a segment, each packed in its own way.

    Attributes:
        start: int64 `[streams + 1]`, where each starts among the segment's symbols.
        per_byte: int64 `[streams]`, see `Packing`.
        limit: int64 `[streams]`, of what remains without the raw bits.
        raw_bits: int64 `[streams]`, lowest bits of each symbol that are sent as they are.
        raw_start: int64 `[streams + 1]`, where each stream starts among the 32-bit words of lowest bits.
        packed_start: int64 `[streams]`, where each stream starts among the packed bytes.
        packed_bytes: int64 `[streams]`, how many it has there; of gaps, how many it may have.
        frame_start: int64 `[frames + 1]`, where each frame starts among the packed bytes.
    """

    start: np.ndarray
    per_byte: np.ndarray
    limit: np.ndarray
    raw_bits: np.ndarray
    raw_start: np.ndarray
    packed_start: np.ndarray
    packed_bytes: np.ndarray
    frame_start: np.ndarray

    @classmethod
    def of(cls, counts: np.ndarray, exponent: np.ndarray) -> "PackedStreams":
        """Choose packings.

        Args:
            counts: int64 `[streams]`, symbols of each.
            exponent: float64 `[streams]`, rising by half octaves; the standard deviation of a stream's symbols is
                2^exponent.

        Returns:
            The packings.
        """
        streams = len(counts)
        per_byte, limit, raw_bits, packed_start, packed_bytes = np.empty((5, streams), np.int64)
        start, raw_start, frame_start = np.empty((3, streams + 1), np.int64)
        lay_out(
            counts, exponent, _WIDEST, _PER_BYTE, _LIMITS, WIDEST_WITHOUT_RAW_BITS, MOST_RAW_BITS,
            start, per_byte, limit, raw_bits, raw_start, packed_bytes,
        )  # fmt: skip
        frames = make_frames(exponent, WIDEST_APART, packed_bytes, packed_start, frame_start)
        starts = start, per_byte, limit, raw_bits, raw_start, packed_start, packed_bytes
        return cls(*starts, frame_start[: frames + 1])

    @cached_property
    def gap_streams(self) -> np.ndarray:
        """Return the streams that are sent as gaps: int64 `[gap frames]`. Their frames come first."""
        return np.flatnonzero((self.per_byte == GAPS) & (self.packed_bytes > 0))

    @property
    def _codes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.per_byte, self.limit, self.raw_bits

    def _frame_bytes(self, gap_bytes: Sequence[int]) -> list[int]:
        """Return the length of each frame before it is coded."""
        lengths: list[int] = np.diff(self.frame_start).tolist()
        return [*gap_bytes, *lengths[len(gap_bytes) :]]

    def encode(self, symbols: np.ndarray) -> CodedStreams:
        """Code the streams.

        Args:
            symbols: int32 `[m]`, one stream after another; they are overwritten.

        Returns:
            The streams in bytes.
        """
        packed, raw = np.empty(self.frame_start[-1], np.uint8), np.empty(self.raw_start[-1], "<u4")
        outside, packed_bytes = np.empty((len(symbols), 2), "<i4"), self.packed_bytes.copy()
        found = kernels.pack_streams(
            symbols, self.start, *self._codes, packed, self.packed_start, packed_bytes, raw, self.raw_start, outside
        )
        gap_bytes = packed_bytes[self.gap_streams].tolist()
        frames = [
            compress(packed[start : start + length])
            for start, length in zip(self.frame_start.tolist(), self._frame_bytes(gap_bytes), strict=False)
        ]
        exceptions = outside[:found].reshape(-1).view(np.uint8).data
        return CodedStreams(gap_bytes, frames, raw.view(np.uint8).data, exceptions)

    def decode(self, coded: CodedStreams) -> np.ndarray:
        """Decode the streams: the inverse of `encode`.

        Args:
            coded: in bytes, with as many frames, gap frames and raw bits as there are.

        Returns:
            int32 `[m]`, one stream after another.

        Raises:
            DataLossError: a stream is damaged.
        """
        symbols = np.empty(self.start[-1], np.int32)
        packed, packed_bytes = np.empty(self.frame_start[-1], np.uint8), self.packed_bytes.copy()
        if (np.array(coded.gap_bytes, np.int64) > packed_bytes[self.gap_streams]).any():
            raise DataLossError("a stream has more gaps than integers", "malformed")
        packed_bytes[self.gap_streams] = coded.gap_bytes
        frames = zip(coded.frames, self.frame_start.tolist(), self._frame_bytes(coded.gap_bytes), strict=False)
        for frame, start, length in frames:
            packed[start : start + length] = decompress(frame, length)
        raw = np.frombuffer(coded.raw, "<u4")
        outside = np.frombuffer(coded.exceptions, "<i4").reshape(-1, 2)
        if not kernels.unpack_streams(
            packed, self.packed_start, packed_bytes, raw, self.raw_start, outside, *self._codes, self.start, symbols
        ):
            raise DataLossError(
                f"gaps or exceptions of a segment of {len(symbols)} integers lie outside their streams", "malformed"
            )
        return symbols


def edges(lengths: np.ndarray) -> np.ndarray:
    """Add lengths up.

    Args:
        lengths: int64 `[n]`.

    Returns:
        int64 `[n + 1]`: where runs of these lengths start, and where the last one ends.
    """
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)))


def compress(data: np.ndarray) -> bytes:
    """Compress bytes by Zstandard, or store them where that is no shorter.

    Args:
        data: uint8 `[n]`.

    Returns:
        At most n bytes; n where they are stored.
    """
    coded: bytes = _coders.compressor.compress(data.data) if len(data) else b""
    return coded if len(coded) < len(data) else data.tobytes()


def decompress(coded: bytes | memoryview, size: int) -> np.ndarray:
    """Decompress bytes: the inverse of `compress`.

    Args:
        coded: what `compress` returned.
        size: how many bytes it was given.

    Returns:
        uint8 `[size]`, read-only.

    Raises:
        DataLossError: `coded` is damaged or holds another number of bytes.
    """
    if len(coded) == size:
        return np.frombuffer(coded, np.uint8)
    if len(coded) > size:
        raise DataLossError(f"{len(coded)} entropy-coded bytes are to hold {size}", "entropy")
    try:
        if coded[0] != PLAIN_FRAME:
            raise DataLossError(f"an entropy-coded stream has the frame header {coded[0]:#04x}", "entropy")
        data = _coders.decompressor.decompress(coded, max_output_size=size)
    except (IndexError, zstandard.ZstdError) as error:
        raise DataLossError(f"an entropy-coded stream is damaged: {error}", "entropy") from error
    if len(data) != size:
        raise DataLossError(f"an entropy-coded stream holds {len(data)} bytes instead of {size}", "entropy")
    return np.frombuffer(data, np.uint8)
