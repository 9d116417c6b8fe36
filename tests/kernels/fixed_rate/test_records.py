"""Records that compiled loops make, byte for byte against plain torch; what both make of coefficients."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrumkv.kernels.fixed_rate import cpu, reference
from spectrumkv.kernels.fixed_rate.layout import (
    GROUP_ROWS,
    HIGHEST_GAIN,
    LOWEST_GAIN,
    WIDEST,
    RecordLayout,
    RowScales,
    exponents_of,
    token_bytes,
)
from spectrumkv.kernels.fixed_rate.operands import Records
from spectrumkv.kernels.fixed_rate.quantizer import (
    ESCAPE_SLOPES,
    HIGHEST_RATIO,
    LOWEST_RATIO,
    escape_limits,
    quantizers,
)
from spectrumkv.kernels.fixed_rate.records import unpack
from spectrumkv.kernels.step_classes import HIGHEST_CLASS, LOWEST_CLASS


def a_block(
    tokens: int, rows: int, base: int, turn: int, tails: float = 0.0, seed: int = 0
) -> tuple[torch.Tensor, RowScales, torch.Tensor, RecordLayout]:
    """Coefficients with standard deviations over ten octaves, and scales that fit them."""
    generator = np.random.default_rng(seed)
    exponents = generator.integers(-60, 20, rows)
    scales = RowScales.of(exponents, generator.integers(-127, 128, rows).astype(np.int8))
    classes = generator.integers(LOWEST_CLASS, HIGHEST_CLASS + 1, tokens)
    gains = generator.integers(LOWEST_GAIN, HIGHEST_GAIN + 1, tokens)
    normal = generator.normal(size=(tokens, rows))
    normal *= np.exp(tails * generator.normal(size=normal.shape))
    values = normal * scales.std * np.exp2(gains[:, None] / 4) + scales.mean
    joined = token_bytes(classes, gains)
    layout = RecordLayout.of(scales, joined, base, turn)
    return torch.from_numpy(values.astype(np.float32)), scales, torch.from_numpy(joined), layout


def unpacked(records: Records, scales: RowScales, tokens: torch.Tensor, layout: RecordLayout) -> torch.Tensor:
    """What compiled loops make of records, escapes left out, over memory that held NaN."""
    order = scales.order
    found = np.full((len(tokens) + 3, len(order)), np.nan, np.float32)
    unpack(
        cpu._words(records.words),
        (layout.widths, layout.profiles, layout.starts),
        (order.view(np.uint64), scales.mean[order], scales.std[order], cpu._GAINS, quantizers().level),
        tokens.numpy(),
        0,
        len(tokens),
        found,
    )
    assert np.isnan(found[len(tokens) :]).all()
    return torch.from_numpy(found[: len(tokens)])


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 40),
    rows=st.sampled_from([4, 12, 32, 36, 64, 160, 384]),
    base=st.integers(-1400, 900),
    turn=st.integers(0, 50),
    tails=st.sampled_from([0.0, 1.0, 3.0]),
    seed=st.integers(0, 5),
)
def test_loops_make_the_bytes_of_plain_torch(
    tokens: int, rows: int, base: int, turn: int, tails: float, seed: int
) -> None:
    coefficients, scales, joined, layout = a_block(tokens, rows, base, turn, tails, seed)
    limits = torch.from_numpy(escape_limits(layout))
    wanted = reference.pack(coefficients, scales, joined, layout, limits)
    found = cpu.pack(coefficients, scales, joined, layout, limits)
    assert wanted.words.numel() == 4 * layout.words
    assert torch.equal(found.words, wanted.words)
    assert torch.equal(found.escape_index, wanted.escape_index)
    assert torch.equal(found.escape_value, wanted.escape_value)
    plain = reference.unpack(wanted, scales, joined, layout)
    mine = unpacked(found, scales, joined, layout)
    mine.view(-1)[reference._words(found.escape_index)] = found.escape_value
    torch.testing.assert_close(mine, plain, rtol=1e-6, atol=0)


def test_errors_are_what_escapes_leave() -> None:
    coefficients, scales, joined, layout = a_block(300, 64, 0, 150, tails=1.0)
    limits = torch.from_numpy(escape_limits(layout))
    records = cpu.pack(coefficients, scales, joined, layout, limits)
    error = reference.unpack(records, scales, joined, layout) - coefficients
    ratio = torch.from_numpy(layout.ratios[layout.profiles])[:, torch.arange(64) // GROUP_ROWS]
    gains = torch.exp2((joined.long() // 16 + LOWEST_GAIN) / 4)
    order = torch.from_numpy(scales.order)
    normalized = (error / torch.from_numpy(scales.std) / gains[:, None])[:, order]
    allowed = ESCAPE_SLOPES**0.5 * torch.exp2(-ratio.clamp(LOWEST_RATIO, HIGHEST_RATIO) / 128)
    assert bool((normalized.abs() <= 4 * allowed + 1e-5).all())
    assert float((normalized.abs() > allowed * 1.001 + 1e-5).double().mean()) < 0.001
    assert 0 < records.escape_value.numel() < 0.2 * coefficients.numel()


def levels_of(width: int) -> torch.Tensor:
    """The levels of a width, from that of cell −2^width up."""
    one_after_another = torch.from_numpy(quantizers().level[2 << width : 4 << width])
    return one_after_another.roll(1 << width)


@pytest.mark.parametrize("width", range(1, WIDEST + 1))
def test_a_quantizer_has_all_of_its_cells_in_order(width: int) -> None:
    level = levels_of(width)
    assert bool((level.diff() > 0).all())
    assert torch.equal(level, -level.flip(0))
    values = torch.arange(-(1 << 19), 1 << 19, 7) / (1 << 16)
    window = reference.windows(values, width)
    assert bool((window.diff() >= 0).all())
    assert (int(window[0]), int(window[-1])) == (-(1 << width), (1 << width) - 4)
    assert torch.equal(reference.windows(torch.tensor([-1e30, 1e30]), width), window[[0, -1]])
    distance = (values[:, None] - level[window[:, None] + torch.arange(4) + (1 << width)]).abs()
    above = torch.searchsorted(level, values).clamp(1, len(level) - 1)
    nearest = torch.minimum((values - level[above - 1]).abs(), (values - level[above]).abs())
    assert torch.equal(distance.amin(dim=1), nearest)


@pytest.mark.parametrize(
    ("width", "least", "ratio"),
    # Lloyd 1982, "Least squares quantization in PCM"; Max 1960, "Quantizing for minimum distortion", table I. The
    # ratios are those of the simulation in docs/experiments/fixed-rate-codec.md.
    [(1, 0.3634, 0.91), (2, 0.1175, 0.79), (3, 0.03454, 0.73), (4, 0.009497, 0.71), (5, 0.002499, 0.69)],
)
def test_distortion_of_a_gaussian_is_that_of_the_simulation(width: int, least: float, ratio: float) -> None:
    values = torch.randn(8_000, GROUP_ROWS, generator=torch.Generator().manual_seed(0))
    odd = reference.path(values, torch.zeros_like(values, dtype=torch.bool), width)
    quantized = levels_of(width)[reference.chosen_cells(values, odd, width) + (1 << width)]
    assert float((values - quantized).square().mean()) == pytest.approx(ratio * least, rel=0.02)


@pytest.mark.parametrize("width", [1, 2, 3, 6, WIDEST])
def test_no_other_path_has_a_smaller_error(width: int) -> None:
    """All parities of eight integers are tried, each from the four cells nearest to its coefficient."""
    rows = 8
    values = torch.randn(200, rows, generator=torch.Generator().manual_seed(width))
    escaping = torch.rand(values.shape, generator=torch.Generator().manual_seed(0)) < 0.1
    level, window = levels_of(width).double(), reference.windows(values, width)
    every = torch.arange(1 << rows)[:, None] >> torch.arange(rows) & 1
    a, b = torch.zeros(2, len(every), dtype=torch.int64)
    total = torch.zeros(len(values), len(every), dtype=torch.float64)
    for row in range(rows):
        remainder = 2 * every[:, row] + a
        cells = window[:, row, None] + torch.arange(4)
        of_remainder = (remainder[None, :, None] == (cells % 4)[:, None]).long().argmax(dim=2)
        chosen = cells.gather(1, of_remainder)
        error = (values[:, row, None].double() - level[chosen + (1 << width)]).square()
        total += torch.where(escaping[:, row, None], 0.0, error)
        a, b = b ^ every[:, row], a
    odd = reference.path(values, escaping, width)
    quantized = level[reference.chosen_cells(values, odd, width) + (1 << width)]
    found = torch.where(escaping, 0.0, (values.double() - quantized).square()).sum(dim=1)
    torch.testing.assert_close(found, total.amin(dim=1), rtol=1e-5, atol=0)


def test_one_bit_is_as_near_as_any_bits_can_be() -> None:
    """Of a width of 1 the four cells nearest to a coefficient are all that there are: every word is tried."""
    rows = 8
    values = torch.randn(100, rows, generator=torch.Generator().manual_seed(0))
    best = torch.full((len(values),), torch.inf, dtype=torch.float64)
    for word in range(1 << rows):
        a, b, levels = 0, 0, []
        for row in range(rows):
            k = -(word >> row & 1)
            levels.append(float(levels_of(1)[2 * k + a + 2]))
            a, b = b ^ (k & 1), a
        best = torch.minimum(best, (values.double() - torch.tensor(levels).double()).square().sum(dim=1))
    odd = reference.path(values, torch.zeros_like(values, dtype=torch.bool), 1)
    quantized = levels_of(1)[reference.chosen_cells(values, odd, 1) + 2]
    torch.testing.assert_close((values - quantized).double().square().sum(dim=1), best, rtol=1e-5, atol=0)


@given(st.floats(2.0**-40, 2.0**40, width=32))
def test_exponents_are_rounded_logarithms(value: float) -> None:
    [found] = exponents_of(np.array([value], np.float32))
    assert abs(found - 8 * np.log2(np.float32(value))) <= 0.5 + 1e-4


def test_equal_drops_keep_the_order_of_the_rows() -> None:
    scales = RowScales(0, np.array([3, 0, 3, 0, 1], np.uint8), np.zeros(5, np.int8))
    assert scales.order.tolist() == [1, 3, 4, 0, 2]
    assert scales.group_exponents.tolist() == [-(16 * 7 // 5) - 1]
