"""Products and transposition against numpy's, in every width of tile."""

import numpy as np
import pytest
from numba.core.errors import TypingError

from spectrumkv.kernels.jit import gemm
from spectrumkv.kernels.jit.gemm import COLUMNS, ROWS, multiply, padded, transpose


def random_matrix(rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(rows * columns).normal(size=(rows, columns)).astype(np.float32)


@pytest.mark.parametrize("depth", [1, 6, 64, 80])
@pytest.mark.parametrize(("rows", "columns"), [(4, 16), (7, 33), (64, 240), (240, 64), (80, 150)])
def test_products_are_those_of_numpy(depth: int, rows: int, columns: int) -> None:
    height, width = padded(rows) + COLUMNS, padded(columns) + COLUMNS
    left, right = random_matrix(depth, height), random_matrix(depth, width)
    product = np.full((height, width), np.nan, np.float32)
    multiply(left, right, rows, columns, product)
    wanted = left.T.astype(np.float64) @ right
    allowed = 1e-6 * (np.abs(left.T) @ np.abs(right)) + 1e-7
    assert (np.abs(product - wanted) <= allowed)[:rows, :columns].all()
    written = -(-rows // ROWS) * ROWS, padded(columns)
    assert np.isnan(product[written[0] :]).all()
    assert np.isnan(product[:, written[1] :]).all()


def test_a_product_does_not_depend_on_what_is_computed_beside_it() -> None:
    left, right = random_matrix(64, 240), random_matrix(64, 80)
    whole, part = np.empty((240, 80), np.float32), np.empty((8, 16), np.float32)
    multiply(left, right, 240, 80, whole)
    multiply(left[:, 100:108].copy(), right[:, 64:].copy(), 8, 16, part)
    assert (part == whole[100:108, 64:]).all()


def test_what_is_not_finite_stays_in_its_row_and_column() -> None:
    left, right = random_matrix(5, 16), random_matrix(5, 32)
    left[3, 2], right[1, 20] = np.inf, np.nan
    product = np.empty((16, 32), np.float32)
    multiply(left, right, 16, 32, product)
    finite = np.isfinite(product)
    assert not finite[2].any()
    assert not finite[:, 20].any()
    assert np.delete(np.delete(finite, 2, axis=0), 20, axis=1).all()


@pytest.mark.parametrize(("rows", "columns"), [(1, 16), (16, 16), (50, 80), (240, 64)])
def test_matrices_are_transposed(rows: int, columns: int) -> None:
    matrix = random_matrix(padded(rows) + COLUMNS, columns)
    transposed = np.full((columns, len(matrix)), np.nan, np.float32)
    transpose(matrix, rows, transposed)
    assert (transposed[:, :rows] == matrix.T[:, :rows]).all()
    assert np.isnan(transposed[:, padded(rows) :]).all()


def test_tiles_and_vectors_fit_every_matrix() -> None:
    assert COLUMNS % gemm.LANES == 0
    assert gemm.WIDE_COLUMNS % COLUMNS == 0
    assert padded(1) == padded(16) == 16
    assert padded(17) == 32


def test_columns_that_lie_one_after_another_are_refused() -> None:
    left, right = random_matrix(16, 16), np.asfortranarray(random_matrix(16, 16))
    with pytest.raises(TypingError, match="contiguous"):
        multiply(left, right, 16, 16, np.empty((16, 16), np.float32))
    with pytest.raises(TypingError, match="contiguous"):
        transpose(right, 16, left)
