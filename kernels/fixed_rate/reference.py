"""Records in plain torch: what the compiled loops and GPU kernels must agree with, byte for byte.

Coefficients come from floating-point products, which differ in their last bits between implementations. Everything
after them is single float32 operations in a fixed order, none of them fused, and integers: subtractions, products, a
truncation, tables, and sums of squared errors, the least of which wins. So the same coefficients make the same records
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
from spectrumkv.kernels.fixed_rate.trellis import STATES, UNREACHED


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
            escaping = part.abs() > limits[profile, group]
            escapes[chosen[:, None], own] = escaping
            for plane in planes(part, escaping, width):
                words[start] = plane
                start = start + 1
    index = escapes.flatten().nonzero()[:, 0]
    index32 = (index + 2**31) % 2**32 - 2**31
    word_bytes, index_bytes = (one.to(torch.int32).view(torch.uint8) for one in (words, index32))
    return Records(word_bytes, index_bytes, coefficients.flatten()[index])


def planes(normalized: torch.Tensor, escaping: torch.Tensor, width: int) -> list[torch.Tensor]:
    """Quantize a group of rows and lay the bits of their integers out by plane.

    Args:
        normalized: float32 `[n, rows]`, coefficients in units of their standard deviation and gain; at most
            `GROUP_ROWS` rows.
        escaping: bool `[n, rows]`, those that are sent as they are.
        width: bits of each.

    Returns:
        int64 `[n]` for each plane, signed numbers of 32 bits.
    """
    if not width:
        return []
    bit = 1 << torch.arange(normalized.shape[1])
    # A group of fewer rows is coded as if the others were 0.
    padding = (0, GROUP_ROWS - normalized.shape[1])
    odd = path(*(torch.nn.functional.pad(one, padding) for one in (normalized, escaping)), width)
    integers = chosen_cells(normalized, odd[:, : normalized.shape[1]], width) >> 1
    bits = [integers >> shift & 1 for shift in range(width - 1, -1, -1)]
    return [((one * bit).sum(dim=1) + 2**31) % 2**32 - 2**31 for one in bits]


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
    count, rows = normalized.shape
    window, level = windows(normalized, width), torch.from_numpy(quantizers().level)
    cells = torch.stack([cell_of_remainder(window, remainder) for remainder in range(4)])
    difference = normalized - level[(2 << width) + (cells & (2 << width) - 1)]
    errors = torch.where(escaping, 0.0, difference * difference)
    costs = torch.full((STATES, count), float(UNREACHED))
    costs[0] = 0
    paths = torch.zeros(STATES, count, rows, dtype=torch.bool)
    for row in range(rows):
        costs_before, paths_before = costs.clone(), paths.clone()
        for state in range(STATES):
            a, b = state >> 1, state & 1
            # The state before was b, then a where the integer is even.
            even, odd = (costs_before[2 * b + (a ^ parity)] + errors[2 * parity + b, :, row] for parity in range(2))
            costs[state] = torch.where(odd < even, odd, even)
            paths[state] = torch.where((odd < even)[:, None], paths_before[2 * b + 1 - a], paths_before[2 * b + a])
            paths[state, :, row] = odd < even
    least, found = costs[0], paths[0]
    for state in range(1, STATES):
        found = torch.where((costs[state] < least)[:, None], paths[state], found)
        least = torch.minimum(costs[state], least)
    return found


def choices(odd: torch.Tensor) -> torch.Tensor:
    """Return bit a of the state before each row: whether the odd cells are at hand.

    Args:
        odd: bool `[n, rows]`, whether each row's integer is odd.

    Returns:
        int64 `[n, rows]`, 0 or 1.
    """
    found = torch.zeros(odd.shape, dtype=torch.int64)
    a, b = torch.zeros(2, len(odd), dtype=torch.int64)
    for row, parity in enumerate(odd.long().T):
        found[:, row] = a
        a, b = b ^ parity, a
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
            for plane in range(width):
                entry = 2 * entry + bits[:, plane]
            normalized[chosen[:, None], own] = level[2 * entry + choices(bits[:, width - 1].bool())]
            start = start + width
    gain = torch.from_numpy(gain_of_byte(1))[tokens.long()]
    coefficients = normalized * gain[:, None] * torch.from_numpy(scales.std) + torch.from_numpy(scales.mean)
    coefficients.view(-1)[_words(records.escape_index)] = records.escape_value
    return coefficients


def _words(data: torch.Tensor) -> torch.Tensor:
    """Return 32-bit words without a sign, int64, of their bytes."""
    return data.clone().view(torch.int32).long() % 2**32
