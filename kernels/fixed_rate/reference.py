"""Records in plain torch: what the compiled loops and GPU kernels must agree with, byte for byte.

Coefficients come from floating-point products, which differ in their last bits between implementations. Everything
after them is single float32 operations in a fixed order, none of them fused, and integers: subtractions, products, a
truncation, tables, and sums of squared errors, the least of which wins. So the same coefficients make the same
records everywhere.
"""

import torch
from torch.nn.functional import pad

from spectrumkv.kernels.fixed_rate.layout import GROUP_ROWS, RecordLayout, RowScales, gain_of_byte
from spectrumkv.kernels.fixed_rate.operands import Records
from spectrumkv.kernels.fixed_rate.quantizer import (
    FRACTION_BITS,
    LARGEST_MAGNITUDE,
    PIECE_BITS,
    POSITION_BITS,
    STATES,
    UNREACHED,
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
    order, groups = torch.from_numpy(scales.order), layout.widths.shape[1]
    # A group of fewer rows is coded as if the others were 0, and their bits are left out.
    unused = (0, groups * GROUP_ROWS - rows)
    grouped = pad(normalized[:, order], unused).view(count, groups, GROUP_ROWS)
    bit = pad(1 << torch.arange(rows) % GROUP_ROWS, unused).view(groups, GROUP_ROWS)
    escaping = grouped.abs() > limits[torch.from_numpy(layout.profiles)][:, :, None]
    escapes = torch.zeros(count, rows, dtype=torch.bool)
    escapes[:, order] = escaping.flatten(1)[:, :rows]
    words, (widths, starts) = torch.zeros(layout.words, dtype=torch.int64), _places(layout)
    for width in sorted(set(widths.flatten().tolist()) - {0}):
        own = widths == width
        part = grouped[own]
        integers = chosen_cells(part, path(part, escaping[own], width), width) >> 1
        for plane in range(width):
            bits = integers >> (width - 1 - plane) & 1
            words[starts[own] + plane] = (bits * bit.expand(count, -1, -1)[own]).sum(dim=1)
    index = escapes.flatten().nonzero()[:, 0]
    word_bytes, index_bytes = (_bytes(one) for one in (words, index))
    return Records(word_bytes, index_bytes, coefficients.flatten()[index])


def windows(normalized: torch.Tensor, width: int) -> torch.Tensor:
    """Find the four cells next to each other that are nearest to each coefficient; each has another remainder by 4.

    Args:
        normalized: float32 of any shape.
        width: bits of a coefficient; at least 1.

    Returns:
        int64 of the same shape, the lowest of the four, from −2^width to 2^width − 4.
    """
    table = quantizers()
    fixed = (normalized.abs().clamp(max=float(LARGEST_MAGNITUDE)) * (1 << FRACTION_BITS)).long()
    piece, within = fixed >> PIECE_BITS, fixed & ((1 << PIECE_BITS) - 1)
    offset, slope = (torch.from_numpy(one[width]).long()[piece] for one in (table.offset, table.slope))
    magnitude = offset + slope * within
    position = torch.where(normalized < 0, ~magnitude, magnitude)
    cell_bits = POSITION_BITS - width
    # In the upper half of a cell the window begins one below it, in the lower half two.
    lowest = (position + (1 << (cell_bits - 1)) >> cell_bits) - 2
    return lowest.clamp(-(1 << width), (1 << width) - 4)


def cell_of_remainder(window: torch.Tensor, remainder: torch.Tensor | int) -> torch.Tensor:
    """Return the cell of a window that has a remainder by 4.

    Args:
        window: int64 of any shape; see `windows`.
        remainder: 0 to 3, as many or one.

    Returns:
        int64, of the windows' shape.
    """
    return (window + 3 - remainder & -4) + remainder


def path(normalized: torch.Tensor, escaping: torch.Tensor, width: int) -> torch.Tensor:
    """Find the path of least squared error through the trellis (Viterbi 1967); see `trellis`.

    Args:
        normalized: float32 `[n, rows]`, of one group.
        escaping: bool `[n, rows]`; what is sent as it is has no error.
        width: bits of each; at least 1.

    Returns:
        bool `[n, rows]`, whether each coefficient's integer is odd.
    """
    window, level = windows(normalized, width), torch.from_numpy(quantizers().level)
    cells = torch.stack([cell_of_remainder(window, remainder) for remainder in range(4)])
    difference = normalized - level[(2 << width) + (cells & (2 << width) - 1)]
    errors = torch.where(escaping, 0.0, difference * difference)
    state = torch.arange(STATES)
    # Bits a and b after a row. Before it the state was b, then a where the integer is even and not a where it is odd.
    a, b = state >> 1, state & 1
    costs = torch.full((STATES, len(normalized)), float(UNREACHED))
    costs[0] = 0
    paths = torch.zeros(costs.shape, dtype=torch.int64)
    for row in range(normalized.shape[1]):
        even, odd = costs[2 * b + a] + errors[b, :, row], costs[2 * b + 1 - a] + errors[2 + b, :, row]
        paths = torch.where(odd < even, paths[2 * b + 1 - a] | 1 << row, paths[2 * b + a])
        costs = torch.where(odd < even, odd, even)
    least, found = costs[0], paths[0]
    for one, its_path in zip(costs[1:], paths[1:], strict=True):
        found = torch.where(one < least, its_path, found)
        least = torch.minimum(one, least)
    return (found[:, None] >> torch.arange(normalized.shape[1]) & 1).bool()


def choices(odd: torch.Tensor) -> torch.Tensor:
    """Return bit a of the state before each row: whether the odd cells are at hand.

    Args:
        odd: bool `[n, rows]`, whether each row's integer is odd.

    Returns:
        int64 `[n, rows]`, 0 or 1.
    """
    found = torch.zeros(odd.shape, dtype=torch.int64)
    # It is what it was two rows before, xor whether the integer between is odd.
    for first in range(2):
        found[:, first + 1 :: 2] = odd[:, first:-1:2].cumsum(dim=1) & 1
    return found


def chosen_cells(normalized: torch.Tensor, odd: torch.Tensor, width: int) -> torch.Tensor:
    """Return the cells of a path.

    Args:
        normalized: see `path`.
        odd: bool `[n, rows]`, whether each coefficient's integer is odd.
        width: bits of each; at least 1.

    Returns:
        int64 `[n, rows]`, from −2^width to 2^width − 1.
    """
    return cell_of_remainder(windows(normalized, width), 2 * odd.long() + choices(odd))


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
    widths, starts = _places(layout)
    grouped = torch.zeros(*widths.shape, GROUP_ROWS)
    for width in sorted(set(widths.flatten().tolist()) - {0}):
        own = widths == width
        bits = words[starts[own][:, None] + torch.arange(width)][:, :, None] >> torch.arange(GROUP_ROWS) & 1
        entry = torch.ones(len(bits), GROUP_ROWS, dtype=torch.int64)
        for plane in range(width):
            entry = 2 * entry + bits[:, plane]
        grouped[own] = level[2 * entry + choices(bits[:, width - 1].bool())]
    normalized = torch.zeros(count, rows)
    normalized[:, torch.from_numpy(scales.order)] = grouped.flatten(1)[:, :rows]
    gain = torch.from_numpy(gain_of_byte(1))[tokens.long()]
    coefficients = normalized * gain[:, None] * torch.from_numpy(scales.std) + torch.from_numpy(scales.mean)
    coefficients.view(-1)[_words(records.escape_index)] = records.escape_value
    return coefficients


def _places(layout: RecordLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the width of each token's groups, and the word at which each begins: int64 `[n, groups]` twice."""
    widths = torch.from_numpy(layout.widths).long()[torch.from_numpy(layout.profiles)]
    return widths, torch.from_numpy(layout.starts)[:-1, None] + widths.cumsum(dim=1) - widths


def _bytes(words: torch.Tensor) -> torch.Tensor:
    """Return the bytes of 32-bit words without a sign, int64."""
    return ((words + 2**31) % 2**32 - 2**31).to(torch.int32).view(torch.uint8)


def _words(data: torch.Tensor) -> torch.Tensor:
    """Return 32-bit words without a sign, int64, of their bytes."""
    return data.clone().view(torch.int32).long() % 2**32
