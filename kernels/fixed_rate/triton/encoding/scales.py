"""Scales of a segment's rows in Triton, as they are sent, and the order that follows: the work of one program."""

import triton.language as tl

from spectrumkv.kernels.fixed_rate import layout
from spectrumkv.kernels.fixed_rate.triton.integers import GROUP_ROWS, power_of_two, rounded
from spectrumkv.kernels.triton_shared import jit

MEAN_UNITS, LARGEST_MEAN = tl.constexpr(float(layout.MEAN_UNITS)), tl.constexpr(float(layout.LARGEST_MEAN))
MEAN_UNIT = tl.constexpr(1.0 / layout.MEAN_UNITS)
LARGEST_DROP = tl.constexpr(layout.LARGEST_DROP)
DROPS = tl.constexpr(layout.LARGEST_DROP + 1)
EXPONENT_RATIO = tl.constexpr(layout.RATIO_UNITS // layout.EXPONENT_UNITS)
# Below what sums of exponents come to, and a multiple of every number of rows once it is multiplied with it.
FLOOR = tl.constexpr(1 << 15)
# Exponents of what is infinite lie above all that bodies may have.
LOWEST_EXPONENT = tl.constexpr(-(1 << 20))


@jit
def scale_rows(
    body_ptr: tl.tensor,
    top_ptr: tl.tensor,
    exponents_ptr: tl.tensor,
    row_means_ptr: tl.tensor,
    drops_ptr: tl.tensor,
    means_ptr: tl.tensor,
    inverse_ptr: tl.tensor,
    powers_ptr: tl.tensor,
    own: tl.tensor,
    rows: tl.constexpr,
    block_rows: tl.constexpr,
) -> tl.tensor:
    """Turn exponents and means into what is sent of them, and that into what coefficients are normalized with.

    Returns:
        int32, the exponent of the largest standard deviation.
    """
    top = tl.full([], LOWEST_EXPONENT, tl.int32)
    for first in range(0, rows, block_rows):
        row = first + tl.arange(0, block_rows)
        exponent = tl.load(exponents_ptr + row, mask=row < rows, other=LOWEST_EXPONENT)
        top = tl.maximum(top, tl.max(exponent, axis=0))
    tl.store(top_ptr, top.to(tl.int64))
    for first in range(0, rows, block_rows):
        row = first + tl.arange(0, block_rows)
        inside = row < rows
        drop = tl.minimum(top - tl.load(exponents_ptr + row, mask=inside, other=0), LARGEST_DROP)
        # What is infinite has no power of two; the host refuses such a segment.
        exponent = tl.minimum(top, 1 << 9) - drop
        mean = tl.load(row_means_ptr + row, mask=inside, other=0.0)
        inverse, std = power_of_two(-exponent, powers_ptr), power_of_two(exponent, powers_ptr)
        mean = rounded(mean * inverse * MEAN_UNITS, -LARGEST_MEAN, LARGEST_MEAN)
        if own:
            tl.store(body_ptr + row, drop.to(tl.uint8), mask=inside)
            tl.store(body_ptr + rows + row, (mean & 255).to(tl.uint8), mask=inside)
        tl.store(drops_ptr + row, drop, mask=inside)
        # A product, since a GPU's quotient may be off by a bit.
        tl.store(means_ptr + row, mean.to(tl.float32) * MEAN_UNIT * std, mask=inside)
        tl.store(inverse_ptr + row, inverse, mask=inside)
    return top


@jit
def sort_rows(
    order_ptr: tl.tensor,
    ranks_ptr: tl.tensor,
    groups_ptr: tl.tensor,
    drops_ptr: tl.tensor,
    top: tl.tensor,
    rows: tl.constexpr,
    groups: tl.constexpr,
    block_sorted: tl.constexpr,
    block_groups: tl.constexpr,
) -> None:
    """Order rows by falling standard deviation, equal ones by number, and average the exponents of each group.

    Drops have few values, so that counting sorts them: rows in their order, after all that drop less.
    """
    value = tl.arange(0, DROPS)[None, :]
    counts = tl.zeros([DROPS], tl.int32)
    for first in range(0, rows, block_sorted):
        row = first + tl.arange(0, block_sorted)
        drop = tl.load(drops_ptr + row, mask=row < rows, other=DROPS)
        counts += tl.sum((drop[:, None] == value).to(tl.int32), axis=0)
    begin = tl.cumsum(counts, axis=0) - counts
    for first in range(0, rows, block_sorted):
        row = first + tl.arange(0, block_sorted)
        drop = tl.load(drops_ptr + row, mask=row < rows, other=DROPS)
        alike = (drop[:, None] == value).to(tl.int32)
        before = begin[None, :] + tl.cumsum(alike, axis=0) - 1
        rank = tl.sum(alike * before, axis=1)
        tl.store(order_ptr + rank, row, mask=row < rows)
        tl.store(ranks_ptr + row, rank, mask=row < rows)
        begin += tl.sum(alike, axis=0)
    tl.debug_barrier()
    for first in range(0, groups, block_groups):
        group = first + tl.arange(0, block_groups)
        rank = group[:, None] * GROUP_ROWS + tl.arange(0, GROUP_ROWS)[None, :]
        row = tl.load(order_ptr + rank, mask=rank < rows, other=0)
        drops = tl.sum(tl.load(drops_ptr + row, mask=rank < rows, other=0), axis=1)
        members = tl.maximum(tl.minimum(rows - group * GROUP_ROWS, GROUP_ROWS), 1)
        # Division rounds towards 0, and is to round down.
        exponent = ((members * top - drops) * EXPONENT_RATIO + members * FLOOR) // members - FLOOR
        tl.store(groups_ptr + group, exponent, mask=group < groups)
