"""How the streams of a segment are packed, and where everything that becomes of them starts; compiled for CPUs."""

import math
from typing import Any

from spectrumkv.kernels.jit.compiled import compiled
from spectrumkv.kernels.spectral.packing import GAPS


@compiled
def lay_out(
    counts: Any,
    exponent: Any,
    widest: Any,
    packing_per_byte: Any,
    packing_limit: Any,
    widest_without_raw_bits: float,
    most_raw_bits: int,
    start: Any,
    per_byte: Any,
    limit: Any,
    raw_bits: Any,
    raw_start: Any,
    packed_bytes: Any,
) -> None:
    """Choose how each stream of a segment is packed.

    Args:
        counts: int64 `[streams]`, symbols of each stream.
        exponent: float64 `[streams]`, binary logarithm of the standard deviation of its symbols.
        widest: float64 `[packings]`, rising to infinity, the largest exponent of each packing.
        packing_per_byte: int64 `[packings]`.
        packing_limit: int64 `[packings]`.
        widest_without_raw_bits: exponent from which on there are raw bits, one more for each octave.
        most_raw_bits: how many there may be.
        start: int64 `[streams + 1]`, written like all others: see `packing.pack_streams`.
        per_byte: int64 `[streams]`.
        limit: int64 `[streams]`.
        raw_bits: int64 `[streams]`.
        raw_start: int64 `[streams + 1]`.
        packed_bytes: int64 `[streams]`; where a stream is packed as gaps, the most that there may be.
    """
    start[0] = raw_start[0] = 0
    for stream in range(counts.size):
        count, packing = counts[stream], 0
        while exponent[stream] > widest[packing]:
            packing += 1
        beyond = math.ceil(exponent[stream] - widest_without_raw_bits)
        per_byte[stream], limit[stream] = packing_per_byte[packing], packing_limit[packing]
        raw_bits[stream] = min(max(beyond, 0), most_raw_bits)
        start[stream + 1] = start[stream] + count
        raw_start[stream + 1] = raw_start[stream] + (count * raw_bits[stream] + 31) // 32
        if per_byte[stream] == GAPS:
            packed_bytes[stream] = count
        elif per_byte[stream]:
            packed_bytes[stream] = (count + per_byte[stream] - 1) // per_byte[stream]
        else:
            packed_bytes[stream] = 0


@compiled
def make_frames(exponent: Any, widest_apart: float, packed_bytes: Any, packed_start: Any, frame_start: Any) -> int:
    """Put packed streams into frames: the wide ones, whose widths differ in raw bits only, share two of them.

    Args:
        exponent: float64 `[streams]`, rising by half octaves.
        widest_apart: exponent up to which a stream has a frame of its own.
        packed_bytes: int64 `[streams]`; streams without any are in no frame.
        packed_start: int64 `[streams]`, written: where each stream's bytes start.
        frame_start: int64 `[streams + 1]` or longer, written: where each frame starts, and where the last one ends.

    Returns:
        How many frames there are.
    """
    place, frames = 0, 0
    for stream in range(exponent.size):
        if exponent[stream] <= widest_apart:
            packed_start[stream] = place
            if packed_bytes[stream]:
                frame_start[frames] = place
                frames += 1
                place += packed_bytes[stream]
    for phase in range(2):
        frame_start[frames] = place
        for stream in range(phase, exponent.size, 2):
            if exponent[stream] > widest_apart:
                packed_start[stream] = place
                place += packed_bytes[stream]
        if place > frame_start[frames]:
            frames += 1
    frame_start[frames] = place
    return frames
