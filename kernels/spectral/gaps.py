"""Streams in which nearly all integers are 0, as the gaps between the others; compiled for CPUs.

An entropy coder of whole bits a byte cannot say in a fraction of a bit that several integers are 0. The number of
zeros before one that is not (run-length coding, Golomb 1966, "Run-length encodings") takes several bits.

A byte 2 · z + s with z < 126 stands for z zeros and then 1 (s = 0) or -1 (s = 1), the byte 252 for 126 zeros. Zeros
after the last integer that is not 0 are left out.
"""

from typing import Any

import numpy as np

from spectrumkv.kernels.jit.compiled import compiled

# Zeros that a byte stands for at most.
LONGEST = 126
LONG_GAP = 2 * LONGEST
# Integers that are looked at together for one that is not 0.
LOOKED_AT = 32


@compiled
def pack_gaps(symbols: Any, packed: Any) -> int:
    """Write a stream's gaps.

    Args:
        symbols: int32 `[m]`, from -1 to 1.
        packed: uint8 `[m or more]`, written.

    Returns:
        How many bytes were written, m at most.
    """
    written, zeros = 0, 0
    for first in range(0, symbols.size, LOOKED_AT):
        together = symbols[first : first + LOOKED_AT]
        found = np.int32(0)
        for index in range(together.size):
            found |= together[index]
        if not found:
            zeros += together.size
            continue
        for index in range(together.size):
            if not together[index]:
                zeros += 1
                continue
            while zeros >= LONGEST:
                packed[written] = LONG_GAP
                written += 1
                zeros -= LONGEST
            packed[written] = 2 * zeros + (1 if together[index] < 0 else 0)
            written += 1
            zeros = 0
    return written


@compiled
def unpack_gaps(packed: Any, symbols: Any) -> bool:
    """Undo `pack_gaps`.

    Args:
        packed: uint8 `[b]`; not trusted.
        symbols: int32 `[m]`, every one written.

    Returns:
        Whether the bytes are gaps of a stream of m integers; if not, the symbols are of no use.
    """
    symbols[:] = 0
    place = 0
    for index in range(packed.size):
        code = int(packed[index])
        if code > LONG_GAP:
            return False
        place += code >> 1
        if code == LONG_GAP:
            continue
        if place >= symbols.size:
            return False
        symbols[place] = 1 - 2 * (code & 1)
        place += 1
    return bool(place <= symbols.size)
