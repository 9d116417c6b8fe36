"""Attention of one decode step on CPUs: one compiled call for all rows of a layer.

It takes one thread, and reads keys and values at the rate at which one thread reads memory.
"""

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types

from spectrumkv.kernels.jit.compiled import compiled, intrinsic
from spectrumkv.kernels.jit.gemm import COLUMNS, ROWS, weigh
from spectrumkv.kernels.jit.llvm import (
    I64,
    LANES,
    VECTOR,
    exchanged_lanes,
    load,
    pointer_to,
    store,
    vector_at,
)
from spectrumkv.kernels.jit.softmax import ZERO, exponentials


def decode_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    firsts: torch.Tensor,
    newest: torch.Tensor,
    scaling: float,
    sliding_window: int | None,
) -> torch.Tensor:
    """Attend over a run of slots for each row of a batch; no slot of a run may have been dropped.

    Args:
        queries: float32 `[batch, query_heads, head_dim]`, any strides; head h reads KV head
            h // (query_heads / kv_heads). `attends` says which head_dim there may be.
        keys: float32 `[kv_heads, slots, head_dim]`, contiguous; those of all requests.
        values: like `keys`.
        firsts: int64 `[batch]`, the first slot of each row.
        newest: int64 `[batch]`, its last.
        scaling: factor of query · key before the softmax.
        sliding_window: how many of the newest slots a row sees; None is all.

    Returns:
        float32 `[batch, query_heads, head_dim]`.
    """
    ends = newest + 1
    if sliding_window:
        firsts = torch.maximum(firsts, ends - sliding_window)
    grouped = queries.reshape(queries.shape[0], keys.shape[0], -1, queries.shape[2])
    attended = torch.empty_like(grouped, memory_format=torch.contiguous_format)
    attend(
        grouped.contiguous().numpy(),
        keys.numpy(),
        values.numpy(),
        firsts.numpy(),
        ends.numpy(),
        np.float32(scaling),
        attended.numpy(),
    )
    return attended.view(queries.shape)


def attends(head_dim: int) -> bool:
    """Return whether heads have whole vectors, as nearly all models' have."""
    return head_dim % COLUMNS == 0


def prepare() -> None:
    """Compile the loops, or load what an earlier process compiled."""
    one, zero = torch.ones(1, 1, COLUMNS), torch.zeros(1, dtype=torch.int64)
    decode_attention(one, one, one, zero, zero, 1.0, None)


@compiled
def attend(queries: Any, keys: Any, values: Any, firsts: Any, ends: Any, scaling: float, attended: Any) -> None:
    """Attend with one query for each row of a batch over its run of slots.

    Args:
        queries: float32 `[batch, kv_heads, g, head_dim]`, head_dim a multiple of `gemm.COLUMNS`.
        keys: float32 `[kv_heads, slots, head_dim]`, contiguous.
        values: like `keys`.
        firsts: int64 `[batch]`, the first slot that a row sees.
        ends: int64 `[batch]`, one past the last.
        scaling: factor of the logits, float32.
        attended: written, like `queries`.
    """
    batch, kv_heads, group, head_dim = queries.shape
    longest, members = (ends - firsts).max(), (group + ROWS - 1) // ROWS * ROWS
    asking, sums = np.empty((members, head_dim), np.float32), np.empty((members, head_dim), np.float32)
    # Weights of members that there are not stay 0.
    logits, weights = np.empty((members, longest), np.float32), np.zeros((members, longest), np.float32)
    shares = np.empty(group, np.float32)
    for row in range(batch):
        tokens = ends[row] - firsts[row]
        for head in range(kv_heads):
            start = (head * keys.shape[1] + firsts[row]) * head_dim
            for member in range(group):
                for i in range(head_dim):
                    asking[member, i] = queries[row, head, member, i] * scaling
            dot_rows(asking, group, keys, start, tokens, logits)
            for member in range(group):
                shares[member] = exponentials(logits[member, :tokens], weights[member, :tokens])
            weigh(weights, values, start, tokens, sums)
            for member in range(group):
                target = attended[row, head, member]
                for i in range(head_dim):
                    target[i] = sums[member, i] * shares[member]


def _lane_sums(builder: Any, vectors: list[Any]) -> Any:
    """Return a vector of the sums of as many vectors: pairs exchange lanes and are added, until one is left."""
    distance = 1
    while len(vectors) > 1:
        masks = exchanged_lanes(distance)
        vectors = [
            builder.fadd(*(builder.shuffle_vector(*pair, mask) for mask in masks))
            for pair in zip(vectors[::2], vectors[1::2], strict=True)
        ]
        distance *= 2
    return vectors[0]


@intrinsic
def _dots(_: Any, row: Any, row_start: Any, memory: Any, start: Any, elements: Any, dots: Any, offset: Any) -> Any:
    """Write the dot products of one row with the `LANES` rows from `start` in memory on.

    Returns:
        The intrinsic's type, and what emits its instructions.
    """

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
        for index, one in enumerate(sums):
            at = builder.add(builder.mul(I64(index), elements), offset)
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

    index = types.int64
    return types.void(row, index, memory, index, index, dots, index), emit


@compiled
def dot_rows(rows: Any, wanted: int, memory: Any, start: int, count: int, dots: Any) -> None:
    """Write the dot products of rows with vectors that lie in memory one after another.

    Args:
        rows: float32 `[m, d]`, contiguous, d a multiple of `gemm.COLUMNS`.
        wanted: how many of the rows take part.
        memory: float32, contiguous.
        start: the element at which the first vector begins.
        count: how many vectors.
        dots: float32 `[m, count or more]`, contiguous, written.
    """
    head_dim, stride = rows.shape[1], dots.shape[1]
    if count < LANES:
        flat = memory.reshape(-1)
        for row in range(wanted):
            for index in range(count):
                dot = ZERO
                for i in range(head_dim):
                    dot += rows[row, i] * flat[start + index * head_dim + i]
                dots[row, index] = dot
        return
    for index in range(0, count, LANES):
        # Where the last ones fill no vector, some are computed twice: the vectors after them belong to others.
        first = min(index, count - LANES)
        for row in range(wanted):
            _dots(rows, row * head_dim, memory, start + first * head_dim, head_dim, dots, row * stride + first)
