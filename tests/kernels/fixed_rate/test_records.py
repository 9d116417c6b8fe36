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
    assert bool((normalized.abs() <= allowed * 1.001 + 1e-5).all())
    assert 0 < records.escape_value.numel() < 0.2 * coefficients.numel()


@pytest.mark.parametrize("width", range(1, WIDEST + 1))
def test_a_quantizer_has_all_of_its_cells_in_order(width: int) -> None:
    magnitudes = torch.arange(0, 1 << 19, 7) / (1 << 16)
    cell = reference.cells(magnitudes, width)
    assert int(cell[0]) == 0
    assert int(reference.cells(torch.tensor([1e30]), width)[0]) <= (1 << (width - 1)) - 1
    assert bool((cell.diff() >= 0).all())
    level = torch.from_numpy(quantizers().level[1 << (width - 1) : 1 << width])
    assert bool((level.diff() > 0).all())


@pytest.mark.parametrize(
    ("width", "least"),
    # Lloyd 1982, "Least squares quantization in PCM"; Max 1960, "Quantizing for minimum distortion", table I.
    [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497), (5, 0.002499)],
)
def test_distortion_of_a_gaussian_is_near_the_least(width: int, least: float) -> None:
    values = torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    level = torch.from_numpy(quantizers().level)[(1 << (width - 1)) + reference.cells(values.abs(), width)]
    distortion = float((values.abs() - level).square().mean())
    assert distortion <= 1.02 * least


@given(st.floats(2.0**-40, 2.0**40, width=32))
def test_exponents_are_rounded_logarithms(value: float) -> None:
    [found] = exponents_of(np.array([value], np.float32))
    assert abs(found - 8 * np.log2(np.float32(value))) <= 0.5 + 1e-4


def test_equal_drops_keep_the_order_of_the_rows() -> None:
    scales = RowScales(0, np.array([3, 0, 3, 0, 1], np.uint8), np.zeros(5, np.int8))
    assert scales.order.tolist() == [1, 3, 4, 0, 2]
    assert scales.group_exponents.tolist() == [-(16 * 7 // 5) - 1]
