"""Products of matrices that fit the cache, and their transposition, in the vectors of the processor at hand.

A product of one head's basis and some tokens is small, and libraries of linear algebra reach half of the processor's
rate there. Here a tile of the result stays in registers from the first factor to the last.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError

from spectrumkv.kernels.jit.compiled import compiled, intrinsic
from spectrumkv.kernels.jit.llvm import (
    I64,
    LANES,
    MANY_REGISTERS,
    VECTOR,
    exchanged_lanes,
    load,
    pointer_to,
    splat,
    store,
    vector_at,
)

# Rows of a tile, and columns of a narrow one. All matrices have multiples of them, on every machine.
ROWS, COLUMNS = 4, 16
# Columns of a wide tile, whose sums take 16 of 32 registers, or 8 of 16.
WIDE_COLUMNS = LANES * (4 if MANY_REGISTERS else 2)


def padded(columns: int) -> int:
    """Return the least number of columns from `columns` up that matrices may have."""
    return -(-columns // COLUMNS) * COLUMNS


def _check_contiguous(*kinds: Any) -> None:
    """Refuse to compile for arrays whose rows do not lie one after another: emitted code sees memory only.

    Args:
        kinds: numba's types of the arrays.

    Raises:
        TypingError: one of them is not contiguous.
    """
    if any(kind.layout != "C" for kind in kinds):
        raise TypingError(f"products are of contiguous arrays, not of {', '.join(map(str, kinds))}")


def _tile(columns: int) -> Callable[..., Any]:
    """Return an intrinsic that computes a product's tile of `ROWS` rows and so many columns."""
    vectors = columns // LANES

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = signature.args
        left = pointer_to(context, builder, kinds[0], *arguments[:2])
        depth_stride, row_stride = arguments[2:4]
        right, right_stride = pointer_to(context, builder, kinds[4], *arguments[4:6]), arguments[6]
        product, product_stride = pointer_to(context, builder, kinds[7], *arguments[7:9]), arguments[9]
        rows = [builder.mul(I64(row), row_stride) for row in range(ROWS)]
        sums = [[cgutils.alloca_once(builder, VECTOR) for _ in range(vectors)] for _ in range(ROWS)]
        for row in sums:
            for one in row:
                builder.store(ir.Constant(VECTOR, None), one)
        with cgutils.for_range(builder, arguments[10]) as loop:
            factors = builder.gep(left, [builder.mul(loop.index, depth_stride)])
            line = builder.gep(right, [builder.mul(loop.index, right_stride)])
            lanes = [load(builder, vector_at(builder, line, I64(LANES * one))) for one in range(vectors)]
            for offset, row in zip(rows, sums, strict=True):
                factor = splat(builder, builder.load(builder.gep(factors, [offset])))
                for lane, one in zip(lanes, row, strict=True):
                    added = builder.fmul(factor, lane, flags=("contract",))
                    builder.store(builder.fadd(builder.load(one), added, flags=("contract",)), one)
        for index, row in enumerate(sums):
            line = builder.gep(product, [builder.mul(I64(index), product_stride)])
            for number, one in enumerate(row):
                store(builder, builder.load(one), vector_at(builder, line, I64(LANES * number)))
        return context.get_dummy_value()

    def tile(
        _: Any,
        left: Any,
        left_start: Any,
        depth_stride: Any,
        row_stride: Any,
        right: Any,
        right_start: Any,
        right_stride: Any,
        product: Any,
        product_start: Any,
        product_stride: Any,
        depth: Any,
    ) -> Any:
        index = types.int64
        _check_contiguous(left, right, product)
        return types.void(left, index, index, index, right, index, index, product, index, index, index), emit

    declared: Callable[..., Any] = intrinsic(tile)
    return declared


_narrow_tile, _wide_tile = _tile(COLUMNS), _tile(WIDE_COLUMNS)


@compiled
def _multiply(
    left: Any,
    depth_stride: int,
    row_stride: int,
    right: Any,
    right_start: int,
    right_stride: int,
    depth: int,
    rows: int,
    columns: int,
    product: Any,
) -> None:
    """Tile a product with wide tiles, and what is left of its columns with narrow ones."""
    stride = product.shape[1]
    for row in range(0, rows, ROWS):
        first = 0
        while first + WIDE_COLUMNS <= columns:
            _wide_tile(
                left, row * row_stride, depth_stride, row_stride, right, right_start + first, right_stride,
                product, row * stride + first, stride, depth,
            )  # fmt: skip
            first += WIDE_COLUMNS
        while first < columns:
            _narrow_tile(
                left, row * row_stride, depth_stride, row_stride, right, right_start + first, right_stride,
                product, row * stride + first, stride, depth,
            )  # fmt: skip
            first += COLUMNS


@compiled
def multiply(left: Any, right: Any, rows: int, columns: int, product: Any) -> None:
    """Write `left`ᵀ · `right`, products and sums fused where the processor can.

    Args:
        left: float32 `[k, m]`, contiguous, m a multiple of `ROWS`.
        right: float32 `[k, n]`, contiguous, n a multiple of `COLUMNS`.
        rows: how many rows of the product are wanted; the rest of a group of `ROWS` is written, too.
        columns: how many columns are wanted; the rest of a group of `COLUMNS` is written, too.
        product: float32 `[m, n]`, contiguous, written.
    """
    depth, stride = left.shape
    _multiply(left, stride, 1, right, 0, right.shape[1], depth, rows, columns, product)


@compiled
def multiply_rows(left: Any, row_stride: int, right: Any, rows: int, columns: int, product: Any) -> None:
    """Write `left` · `right`, products and sums fused where the processor can.

    Args:
        left: float32 memory, contiguous: rows of as many elements as `right` has rows, a multiple of `ROWS` of them.
        row_stride: elements from row to row of `left`.
        right: float32 `[k, n]`, contiguous, n a multiple of `COLUMNS`.
        rows: how many rows of the product are wanted; the rest of a group of `ROWS` is written, too.
        columns: how many columns are wanted; the rest of a group of `COLUMNS` is written, too.
        product: float32 `[m, n]`, contiguous, written.
    """
    depth, stride = right.shape
    _multiply(left, 1, row_stride, right, 0, stride, depth, rows, columns, product)


@compiled
def weigh(weights: Any, memory: Any, start: int, count: int, product: Any) -> None:
    """Write `weights` · rows of memory: each row's weighted sum of vectors that lie one after another.

    Args:
        weights: float32 `[m, k]`, contiguous, m a multiple of `ROWS`.
        memory: float32, contiguous.
        start: the element at which the first vector begins.
        count: how many vectors, up to k.
        product: float32 `[m, n]`, contiguous, n the length of a vector and a multiple of `COLUMNS`; written.
    """
    rows, columns = product.shape
    _multiply(weights, 1, weights.shape[1], memory, start, columns, count, rows, columns, product)


@intrinsic
def _transpose_square(
    _: Any, matrix: Any, start: Any, stride: Any, transposed: Any, transposed_start: Any, transposed_stride: Any
) -> Any:
    """Transpose `LANES` rows of as many floats; see `exchanged_lanes`.

    Returns:
        The intrinsic's type, and what emits its instructions.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source = pointer_to(context, builder, signature.args[0], *arguments[:2])
        target = pointer_to(context, builder, signature.args[3], *arguments[3:5])
        offsets = [builder.mul(I64(row), arguments[2]) for row in range(LANES)]
        rows = [load(builder, vector_at(builder, source, offset)) for offset in offsets]
        distance = 1
        while distance < LANES:
            for one in (row for row in range(LANES) if not row & distance):
                pair = rows[one], rows[one + distance]
                for index, lanes in zip((one, one + distance), exchanged_lanes(distance), strict=True):
                    rows[index] = builder.shuffle_vector(*pair, lanes)
            distance *= 2
        for row, value in enumerate(rows):
            offset = builder.mul(I64(row), arguments[5])
            store(builder, value, vector_at(builder, target, offset))
        return context.get_dummy_value()

    index = types.int64
    _check_contiguous(matrix, transposed)
    return types.void(matrix, index, index, transposed, index, index), emit


@compiled
def transpose(matrix: Any, rows: int, transposed: Any) -> None:
    """Write the transposed matrix.

    Args:
        matrix: float32 `[m, n]`, contiguous, both multiples of `COLUMNS`.
        rows: how many rows are wanted; of more, the rest of a group of `COLUMNS` is written, too.
        transposed: float32 `[n, m]`, contiguous, written.
    """
    capacity, columns = matrix.shape
    for row in range(0, rows, LANES):
        for column in range(0, columns, LANES):
            _transpose_square(matrix, row * columns + column, columns, transposed, column * capacity + row, capacity)
