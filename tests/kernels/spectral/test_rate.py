"""Rate control's loops against numpy."""

import numpy as np
import pytest

from spectrumkv.kernels.spectral import rate
from spectrumkv.kernels.spectral.rate import LOWEST, PER_OCTAVE

# Any rising curve will do; this one ends two octaves above zero.
TABLE = np.logspace(-3, 1, (2 - LOWEST) * PER_OCTAVE + 1)
UNSENT = -4.0


def naive_entropies(exponents: np.ndarray) -> np.ndarray:
    grid = LOWEST + np.arange(len(TABLE)) / PER_OCTAVE
    bits = np.interp(exponents, np.append(grid, grid[-1] + 1000), np.append(TABLE, TABLE[-1] + 1000))
    bits[exponents <= UNSENT] = 0.0
    return bits


@pytest.mark.parametrize("streams", [1, 7, 40])
@pytest.mark.parametrize("shift", [-25.0, -3.21, 0.0, 4.6, 30.0])
def test_expected_bits(streams: int, shift: float) -> None:
    generator = np.random.default_rng(streams)
    exponents, counts = generator.uniform(-12, 12, streams), generator.integers(0, 1000, streams)
    wanted = float(counts @ naive_entropies(exponents - shift))
    assert rate.expected_bits(exponents, shift, counts, TABLE, UNSENT) == pytest.approx(wanted, rel=1e-12)
    shifts, bits = np.array([shift, shift + 1, -shift]), np.full(3, np.nan)
    counts[0] += 1
    rate.mean_bits(exponents, shifts, counts, TABLE, UNSENT, bits)
    means = [counts @ naive_entropies(exponents - one) / counts.sum() for one in shifts]
    assert bits == pytest.approx(means, rel=1e-12)


@pytest.mark.parametrize("exponent", [LOWEST, 2.0, 2.0 - 1 / PER_OCTAVE, UNSENT, np.nextafter(UNSENT, 0)])
def test_the_ends_of_the_table(exponent: float) -> None:
    entropy = rate.entropy(exponent, TABLE, UNSENT)
    assert entropy == pytest.approx(float(naive_entropies(np.array([exponent]))[0]), rel=1e-12)


@pytest.mark.parametrize("available", [1.0, 500.0, 4_000.0])
def test_the_finest_step_within_some_bits(available: float) -> None:
    exponents, counts = np.arange(-6.0, 6.0, 0.5), np.arange(24)
    step = rate.finest_within(available, -20.0, 20.0, 1e-4, exponents, counts, TABLE, UNSENT)
    taken, finer = (rate.expected_bits(exponents, one, counts, TABLE, UNSENT) for one in (step, step - 2e-4))
    assert taken <= available < finer


def test_no_step_is_coarse_enough() -> None:
    assert rate.finest_within(1.0, -2.0, 2.0, 1e-4, np.full(3, 9.0), np.ones(3, int), TABLE, UNSENT) == 2.0
