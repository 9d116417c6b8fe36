"""Dot products of rows in memory with a few others, on CPUs."""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from spectrumkv.kernels.jit.compiled import compiled, intrinsic
from spectrumkv.kernels.jit.machine_types import I64
from spectrumkv.kernels.jit.vectors import LANES, VECTOR, exchanged_lanes, load, pointer_to, store, vector_at

ZERO = np.float32(0)


def _lane_sums(builder: Any, vectors: list[Any]) -> Any:
    """A vector of the sums of as many vectors: pairs exchange lanes and are added, until one is left."""
    apart = 1
    while len(vectors) > 1:
        masks = exchanged_lanes(apart)
        vectors = [
            builder.fadd(*(builder.shuffle_vector(*pair, mask) for mask in masks))
            for pair in zip(vectors[::2], vectors[1::2], strict=True)
        ]
        apart *= 2
    return vectors[0]


@intrinsic
def _dots(_: Any, row: Any, row_start: Any, memory: Any, start: Any, elements: Any, dots: Any, place: Any) -> Any:
    """Dot products of one row with the `LANES` rows that lie in memory from `start` on."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        left = pointer_to(context, builder, signature.args[0], *arguments[:2])
        right = pointer_to(context, builder, signature.args[2], *arguments[2:4])
        written = pointer_to(context, builder, signature.args[5], *arguments[5:7])
        elements = arguments[4]
        entered, vectors = builder.block, builder.udiv(elements, I64(LANES))
        body, done = builder.append_basic_block("body"), builder.append_basic_block("done")
        builder.branch(body)
        builder.position_at_end(body)
        number, sums = builder.phi(I64), [builder.phi(VECTOR) for _ in range(LANES)]
        offset = builder.mul(number, I64(LANES))
        factor = load(builder, vector_at(builder, left, offset))
        number.add_incoming(I64(0), entered)
        following = []
        for place, one in enumerate(sums):
            at = builder.add(builder.mul(I64(place), elements), offset)
            product = builder.fmul(factor, load(builder, vector_at(builder, right, at)), flags=("contract",))
            following.append(builder.fadd(one, product, flags=("contract",)))
        after = builder.add(number, I64(1))
        number.add_incoming(after, body)
        for one, value in zip(sums, following, strict=True):
            one.add_incoming(ir.Constant(VECTOR, None), entered)
            one.add_incoming(value, body)
        builder.cbranch(builder.icmp_unsigned("<", after, vectors), body, done)
        builder.position_at_end(done)
        store(builder, _lane_sums(builder, following), vector_at(builder, written, I64(0)))
        return context.get_dummy_value()

    position = types.int64
    return types.void(row, position, memory, position, position, dots, position), emit


@compiled
def dot_rows(rows: Any, wanted: int, memory: Any, start: int, count: int, dots: Any) -> None:
    """Write the dot products of rows with vectors that lie in memory one after another.

    Args:
        rows: float32 `[m, d]`, contiguous, d a multiple of `small_products.COLUMNS`.
        wanted: how many rows.
        memory: float32, contiguous.
        start: the element at which the first vector begins.
        count: how many vectors.
        dots: float32 `[m, count or more]`, contiguous, written.
    """
    head_dim, stride = rows.shape[1], dots.shape[1]
    if count < LANES:
        flat = memory.reshape(-1)
        for row in range(wanted):
            for place in range(count):
                dot = ZERO
                for i in range(head_dim):
                    dot += rows[row, i] * flat[start + place * head_dim + i]
                dots[row, place] = dot
        return
    for place in range(0, count, LANES):
        # The last ones are done twice where they are no whole vector: what lies behind them is nobody's.
        first = min(place, count - LANES)
        for row in range(wanted):
            _dots(rows, row * head_dim, memory, start + first * head_dim, head_dim, dots, row * stride + first)
