"""A stream of integers to bytes: packed so that one byte has several bits of entropy, then coded.

The Huffman stage of Zstandard is within a few percent of the entropy of a stream whose symbols are alike and take
4 bits or more, at a gigabyte a second. Narrow symbols are therefore packed several to a byte first; wide ones give
up their lowest bits, which are noise, and send those as they are.
"""

import math
from dataclasses import dataclass, replace
from functools import cache
from threading import local

import numpy as np
import zstandard

from spectrumkv.common.errors import DataLossError
from spectrumkv.kernels import spectral_streams as kernels


@dataclass(frozen=True)
class Packing:
    """How symbols of a stream share bytes.

    Attributes:
        per_byte: symbols in one byte; 0 where the stream is not sent at all.
        limit: largest magnitude; larger ones are exceptions, sent apart.
        widest: exponent of two, in steps, of the standard deviation up to which this packing is used.
        raw_bits: lowest bits of each symbol that are sent as they are; `limit` is for what remains.
    """

    per_byte: int
    limit: int
    widest: float
    raw_bits: int = 0

    @property
    def base(self) -> int:
        """Values of one symbol."""
        return 2 * self.limit + 1

    def packed_bytes(self, count: int) -> int:
        """Length of `count` packed symbols before they are coded."""
        return -(-count // self.per_byte) if self.per_byte else 0

    def raw_bytes(self, count: int) -> int:
        """Length of the lowest bits of `count` symbols."""
        return -(-count * self.raw_bits // 8)


# Limits lie at 5 standard deviations or more: coefficients have heavy tails, and an exception costs 8 bytes.
PACKINGS = (
    Packing(per_byte=0, limit=0, widest=-4.0),
    Packing(per_byte=5, limit=1, widest=-1.75),
    Packing(per_byte=3, limit=2, widest=-1.0),
    Packing(per_byte=2, limit=7, widest=0.5),
    Packing(per_byte=1, limit=127, widest=math.inf),
)
# Exponent of the spread above which the lowest bits are split off.
WIDEST_WITHOUT_RAW_BITS = 4.5
# What compiled loops move at once is 32 bits; spreads beyond 2^28 steps are none that anybody has.
MOST_RAW_BITS = 24
# First byte of a frame that says nothing of its size: one that does would be given as much memory as it says.
PLAIN_FRAME = 0
LARGEST_WINDOW_BYTES = 1 << 20
EXCEPTION = np.dtype([("index", "<u4"), ("value", "<i4")])

_COMPRESSION = zstandard.ZstdCompressionParameters.from_level(
    1, format=zstandard.FORMAT_ZSTD1_MAGICLESS, write_content_size=False, write_checksum=False, min_match=7
)


class _Coders(local):
    """Zstandard's state of one thread."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(compression_params=_COMPRESSION)
        self.decompressor = zstandard.ZstdDecompressor(
            format=zstandard.FORMAT_ZSTD1_MAGICLESS, max_window_size=LARGEST_WINDOW_BYTES
        )


_coders = _Coders()


def packing_for(exponent: float) -> Packing:
    """The packing of a stream whose symbols have a standard deviation of 2^`exponent`."""
    if exponent > WIDEST_WITHOUT_RAW_BITS:
        return _with_raw_bits(min(math.ceil(exponent - WIDEST_WITHOUT_RAW_BITS), MOST_RAW_BITS))
    return next(packing for packing in PACKINGS if exponent <= packing.widest)


@cache
def _with_raw_bits(raw_bits: int) -> Packing:
    return replace(PACKINGS[-1], raw_bits=raw_bits)


@dataclass(frozen=True)
class CodedStream:
    """One stream in bytes.

    Attributes:
        coded: packed symbols, as `compress` leaves them.
        raw: lowest bits.
        exceptions: `EXCEPTION` `[e]`.
    """

    coded: bytes
    raw: bytes
    exceptions: np.ndarray


def encode_stream(symbols: np.ndarray, packing: Packing) -> CodedStream:
    """Code a stream.

    Args:
        symbols: int32 `[m]`; used up.
        packing: how.
    """
    count = len(symbols)
    raw = np.empty(-(-count * packing.raw_bits // 32), "<u4")
    outside, values = np.empty(count, np.uint32), np.empty(count, np.int32)
    found = kernels.split(symbols, packing.limit, packing.raw_bits, raw, outside, values)
    exceptions = np.empty(found, EXCEPTION)
    exceptions["index"], exceptions["value"] = outside[:found], values[:found]
    packed = np.empty(packing.packed_bytes(count), np.uint8)
    if packing.per_byte:
        kernels.pack(symbols, packing.per_byte, packing.limit, packed)
    return CodedStream(compress(packed), raw.tobytes()[: packing.raw_bytes(count)], exceptions)


def decode_stream(
    coded: memoryview, raw: memoryview, exceptions: memoryview, packing: Packing, symbols: np.ndarray
) -> None:
    """Inverse of `encode_stream`: write int32 `symbols`, all of them.

    Raises:
        DataLossError: the stream is damaged.
    """
    packed = decompress(coded, packing.packed_bytes(len(symbols)))
    if packing.per_byte:
        kernels.unpack(packed, packing.per_byte, packing.limit, symbols)
    else:
        symbols[:] = 0
    words = np.zeros(-(-len(symbols) * packing.raw_bits // 32), "<u4")
    words.view(np.uint8)[: len(raw)] = np.frombuffer(raw, np.uint8)
    found = np.frombuffer(exceptions, EXCEPTION)
    outside, values = found["index"].copy(), found["value"].copy()
    if not kernels.join(symbols, packing.raw_bits, words, outside, values):
        raise DataLossError(f"an exception lies outside its stream of {len(symbols)} symbols", "malformed")


def compress(data: np.ndarray) -> bytes:
    """Code bytes; never longer than one byte more than they are."""
    coded = _coders.compressor.compress(data.data) if len(data) else b""
    return b"\x01" + coded if len(coded) < len(data) else b"\x00" + data.tobytes()


def decompress(coded: memoryview, size: int) -> np.ndarray:
    """Inverse of `compress`.

    Args:
        coded: what `compress` returned.
        size: how many bytes it was given.

    Returns:
        uint8 `[size]`, read-only: compiled loops are compiled for that.

    Raises:
        DataLossError: `coded` is damaged or holds another number of bytes.
    """
    try:
        if coded[0] == 0:
            data: memoryview | bytes = coded[1:]
        else:
            if coded[1] != PLAIN_FRAME:
                raise DataLossError(f"an entropy-coded stream has the frame header {coded[1]:#04x}", "entropy")
            data = _coders.decompressor.decompress(coded[1:], max_output_size=size)
    except (IndexError, zstandard.ZstdError) as error:
        raise DataLossError(f"an entropy-coded stream is damaged: {error}", "entropy") from error
    if len(data) != size:
        raise DataLossError(f"an entropy-coded stream holds {len(data)} bytes instead of {size}", "entropy")
    array: np.ndarray = np.frombuffer(data, np.uint8)
    array.flags.writeable = False
    return array
