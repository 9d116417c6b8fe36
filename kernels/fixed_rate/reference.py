"""Records in plain torch: what the compiled loops and GPU kernels must agree with, byte for byte.

Coefficients come from floating-point products, which differ in their last bits between implementations. Everything
after them is single float32 operations in a fixed order and integers: a subtraction, two multiplications (a
subtraction and a product cannot be fused), a truncation, and a table. So the same coefficients make the same records
everywhere.
"""

import torch

from spectrumkv.kernels.fixed_rate.layout import GROUP_ROWS, RecordLayout, RowScales, gain_of_byte
from spectrumkv.kernels.fixed_rate.operands import Records
from spectrumkv.kernels.fixed_rate.quantizer import (
    FRACTION_BITS,
    LARGEST_MAGNITUDE,
    PIECE_BITS,
    POSITION_BITS,
    quantizers,
)


def pack(
    coefficients: torch.Tensor,
    scales: RowScales,
    tokens: torch.Tensor,
    layout: RecordLayout,
    limits: torch.Tensor,
) -> Records:
    """Quantize a segment's coefficients.

    Args:
        coefficients: float32 `[n, rows]`.
        scales: of the rows.
        tokens: uint8 `[n]`; see `layout.token_bytes`.
        layout: of the records.
        limits: float32 `[2 · PROFILES, groups]`; see `quantizer.escape_limits`.

    Returns:
        The records.
    """
    count, rows = coefficients.shape
    inverse_gain = torch.from_numpy(gain_of_byte(-1))[tokens.long()]
    mean, inverse_std = torch.from_numpy(scales.mean), torch.from_numpy(scales.inverse_std)
    normalized = (coefficients - mean) * inverse_std * inverse_gain[:, None]
    words = torch.zeros(layout.words, dtype=torch.int64)
    escapes = torch.zeros(count, rows, dtype=torch.bool)
    order, starts = torch.from_numpy(scales.order), torch.from_numpy(layout.starts)
    profiles, widths = torch.from_numpy(layout.profiles), torch.from_numpy(layout.widths).long()
    for profile in sorted(set(profiles.tolist())):
        chosen = (profiles == profile).nonzero()[:, 0]
        start = starts[chosen]
        for group, width in enumerate(widths[profile].tolist()):
            own = order[GROUP_ROWS * group : GROUP_ROWS * (group + 1)]
            part = normalized[chosen[:, None], own]
            escapes[chosen[:, None], own] = part.abs() > limits[profile, group]
            for plane in planes(part, width):
                words[start] = plane
                start = start + 1
    index = escapes.flatten().nonzero()[:, 0]
    index32 = (index + 2**31) % 2**32 - 2**31
    word_bytes, index_bytes = (one.to(torch.int32).view(torch.uint8) for one in (words, index32))
    return Records(word_bytes, index_bytes, coefficients.flatten()[index])


def planes(normalized: torch.Tensor, width: int) -> list[torch.Tensor]:
    """Quantize a group of rows and lay their bits out by plane.

    Args:
        normalized: float32 `[n, rows]`, coefficients in units of their standard deviation and gain; at most
            `GROUP_ROWS` rows.
        width: bits of each.

    Returns:
        int64 `[n]` for each plane, signed numbers of 32 bits.
    """
    if not width:
        return []
    bit = 1 << torch.arange(normalized.shape[1])
    cell = cells(normalized.abs(), width)
    bits = [normalized < 0, *((cell >> shift & 1).bool() for shift in range(width - 2, -1, -1))]
    return [((one * bit).sum(dim=1) + 2**31) % 2**32 - 2**31 for one in bits]


def cells(magnitudes: torch.Tensor, width: int) -> torch.Tensor:
    """Find the cell of each magnitude.

    Args:
        magnitudes: float32 of any shape, 0 or more, in units of standard deviation and gain.
        width: bits of a coefficient, its sign among them; at least 1.

    Returns:
        int64 of the same shape, from 0 to 2^(width − 1) − 1.
    """
    table = quantizers()
    fixed = (magnitudes.clamp(max=float(LARGEST_MAGNITUDE)) * (1 << FRACTION_BITS)).long()
    piece, within = fixed >> PIECE_BITS, fixed & ((1 << PIECE_BITS) - 1)
    offset, slope = (torch.from_numpy(one[width]).long()[piece] for one in (table.offset, table.slope))
    return (offset + slope * within) >> (POSITION_BITS + 1 - width)


def unpack(records: Records, scales: RowScales, tokens: torch.Tensor, layout: RecordLayout) -> torch.Tensor:
    """Dequantize a segment's coefficients: the inverse of `pack`.

    Args:
        records: of the segment.
        scales: of the rows.
        tokens: uint8 `[n]`.
        layout: of the records.

    Returns:
        float32 `[n, rows]`.
    """
    count, rows = len(tokens), len(scales.drops)
    level, words = torch.from_numpy(quantizers().level), _words(records.words)
    normalized = torch.zeros(count, rows)
    order, starts = torch.from_numpy(scales.order), torch.from_numpy(layout.starts)
    profiles, widths = torch.from_numpy(layout.profiles), torch.from_numpy(layout.widths).long()
    for profile in sorted(set(profiles.tolist())):
        chosen = (profiles == profile).nonzero()[:, 0]
        start = starts[chosen]
        for group, width in enumerate(widths[profile].tolist()):
            if not width:
                continue
            own = order[GROUP_ROWS * group : GROUP_ROWS * (group + 1)]
            bits = words[start[:, None] + torch.arange(width)][:, :, None] >> torch.arange(len(own)) & 1
            entry = torch.ones(len(chosen), len(own), dtype=torch.int64)
            for plane in range(1, width):
                entry = 2 * entry + bits[:, plane]
            normalized[chosen[:, None], own] = torch.where(bits[:, 0].bool(), -level[entry], level[entry])
            start = start + width
    gain = torch.from_numpy(gain_of_byte(1))[tokens.long()]
    coefficients = normalized * gain[:, None] * torch.from_numpy(scales.std) + torch.from_numpy(scales.mean)
    coefficients.view(-1)[_words(records.escape_index)] = records.escape_value
    return coefficients


def _words(data: torch.Tensor) -> torch.Tensor:
    """Return 32-bit words without a sign, int64, of their bytes."""
    return data.clone().view(torch.int32).long() % 2**32
