"""Integers to bytes: streams of equal spread, packed so that one byte has several bits of entropy, then coded.

The Huffman stage of Zstandard is within a few percent of the entropy of a stream whose symbols are alike and take
4 bits or more, at a gigabyte a second. Narrow symbols are therefore packed several to a byte first; wide ones give
up their lowest bits, which are noise, and send those as they are.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import zstandard

from spectrumkv.common.errors import DataLossError


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
EXCEPTION = np.dtype([("index", "<u4"), ("value", "<i4")])

_COMPRESSION = zstandard.ZstdCompressionParameters.from_level(
    1, format=zstandard.FORMAT_ZSTD1_MAGICLESS, write_content_size=False, write_checksum=False, min_match=7
)


def packing_for(exponent: float) -> Packing:
    """The packing of a stream whose symbols have a standard deviation of 2^`exponent`."""
    packing = next(packing for packing in PACKINGS if exponent <= packing.widest)
    return replace(packing, raw_bits=math.ceil(max(0.0, exponent - WIDEST_WITHOUT_RAW_BITS)))


def split_raw_bits(symbols: np.ndarray, packing: Packing) -> tuple[np.ndarray, bytes]:
    """Split off the lowest bits: what remains, int32 `[n]`, and the bits of all symbols, packed."""
    if not packing.raw_bits:
        return symbols, b""
    weights = np.arange(packing.raw_bits)
    return symbols >> packing.raw_bits, np.packbits(symbols[:, None] >> weights & 1).tobytes()


def raw_bytes(count: int, packing: Packing) -> int:
    """Length of the packed lowest bits of `count` symbols."""
    return -(-count * packing.raw_bits // 8)


def join_raw_bits(high: np.ndarray, raw: np.ndarray, packing: Packing) -> np.ndarray:
    """Inverse of `split_raw_bits`: int32 `[n]`."""
    if not packing.raw_bits:
        return high
    bits = np.unpackbits(raw, count=len(high) * packing.raw_bits).reshape(-1, packing.raw_bits)
    joined: np.ndarray = (high << packing.raw_bits) + (bits.astype(np.int32) << np.arange(packing.raw_bits)).sum(
        axis=1
    )
    return joined


def pack(symbols: np.ndarray, packing: Packing) -> tuple[np.ndarray, np.ndarray]:
    """Pack a stream without its raw bits.

    Args:
        symbols: int32 `[n]`.
        packing: how.

    Returns:
        uint8 `[ceil(n / per_byte)]`, and the symbols that do not fit as `EXCEPTION` `[e]`.
    """
    outside = np.flatnonzero(np.abs(symbols) > packing.limit)
    exceptions = np.empty(len(outside), EXCEPTION)
    exceptions["index"], exceptions["value"] = outside, symbols[outside]
    if not packing.per_byte:
        return np.empty(0, np.uint8), exceptions
    shifted = np.clip(symbols, -packing.limit, packing.limit) + packing.limit
    if packing.per_byte == 1:
        return shifted.astype(np.uint8), exceptions
    padded = np.zeros(-(-len(shifted) // packing.per_byte) * packing.per_byte, np.int32)
    padded[: len(shifted)] = shifted
    weights = packing.base ** np.arange(packing.per_byte)
    return (padded.reshape(-1, packing.per_byte) @ weights).astype(np.uint8), exceptions


def unpack(packed: np.ndarray, count: int, packing: Packing) -> np.ndarray:
    """Inverse of `pack`, without the exceptions: int16 `[count]`."""
    if not packing.per_byte:
        return np.zeros(count, np.int16)
    table = _unpacking_table(packing)
    symbols: np.ndarray = table[packed].reshape(-1)[:count]
    return symbols


def _unpacking_table(packing: Packing) -> np.ndarray:
    """int16 `[256, per_byte]`: the symbols in each byte."""
    digits = np.arange(256)[:, None] // packing.base ** np.arange(packing.per_byte) % packing.base
    table: np.ndarray = (digits - packing.limit).astype(np.int16)
    return table


def compress(data: np.ndarray) -> bytes:
    """Code bytes; never longer than one byte more than they are."""
    coded = zstandard.ZstdCompressor(compression_params=_COMPRESSION).compress(data.tobytes()) if len(data) else b""
    return b"\x01" + coded if len(coded) < len(data) else b"\x00" + data.tobytes()


def decompress(coded: memoryview, size: int) -> np.ndarray:
    """Inverse of `compress`.

    Args:
        coded: what `compress` returned.
        size: how many bytes it was given.

    Returns:
        uint8 `[size]`.

    Raises:
        DataLossError: `coded` is damaged or holds another number of bytes.
    """
    try:
        if coded[0] == 0:
            data = bytes(coded[1:])
        else:
            decompressor = zstandard.ZstdDecompressor(format=zstandard.FORMAT_ZSTD1_MAGICLESS)
            data = decompressor.decompress(coded[1:], max_output_size=size)
    except (IndexError, zstandard.ZstdError) as error:
        raise DataLossError(f"an entropy-coded stream is damaged: {error}", "entropy") from error
    if len(data) != size:
        raise DataLossError(f"an entropy-coded stream holds {len(data)} bytes instead of {size}", "entropy")
    array: np.ndarray = np.frombuffer(data, np.uint8)
    return array
