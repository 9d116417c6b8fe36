"""The loops of the spectral codec against plain numpy and torch."""

import numpy as np
import pytest
import torch

from spectrumkv.kernels import spectral_streams as streams

POISON = np.iinfo(np.int32).min


def layout(heads: int, head_dim: int, tokens: int, runs: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Columns in a random order, cut into runs; tokens of random classes; streams by the sum of class and run."""
    generator = np.random.default_rng(seed)
    columns = generator.permutation(heads * head_dim)
    cuts = np.sort(generator.choice(np.arange(1, len(columns)), runs - 1, replace=False))
    run_start = np.concatenate(([0], cuts, [len(columns)])).astype(np.int64)
    row_class = generator.integers(0, 4, tokens)
    stream_of = np.arange(4)[:, None] + np.arange(runs)[None, :]
    counts = np.zeros(runs + 3, np.int64)
    for row in row_class:
        counts[stream_of[row]] += np.diff(run_start)
    return {
        "columns": columns,
        "column_offset": (columns // head_dim * tokens * head_dim + columns % head_dim).astype(np.int32),
        "run_start": run_start,
        "row_class": row_class,
        "stream_of": stream_of,
        "start": np.concatenate(([0], np.cumsum(counts))),
        "step": np.exp2(np.arange(4) / 2 - 3).astype(np.float32),
    }


def naive_streams(coefficients: np.ndarray, plan: dict[str, np.ndarray]) -> np.ndarray:
    """Token by token, run by run, appended to lists."""
    tokens = coefficients.shape[1]
    lists: list[list[int]] = [[] for _ in range(len(plan["start"]) - 1)]
    for token in range(tokens):
        row = coefficients[:, token].reshape(-1)[plan["columns"]]
        scaled = np.rint(row * (1 / plan["step"])[plan["row_class"][token]]).astype(np.int32)
        for run in range(len(plan["run_start"]) - 1):
            wanted = scaled[plan["run_start"][run] : plan["run_start"][run + 1]]
            lists[plan["stream_of"][plan["row_class"][token], run]] += wanted.tolist()
    return np.array([symbol for one in lists for symbol in one], np.int32)


@pytest.mark.parametrize(("heads", "head_dim", "tokens", "runs"), [(2, 16, 1, 2), (3, 64, 17, 5), (5, 80, 33, 11)])
def test_coefficients_are_sorted_into_streams_and_back(heads: int, head_dim: int, tokens: int, runs: int) -> None:
    plan = layout(heads, head_dim, tokens, runs)
    coefficients = np.random.default_rng(1).normal(0, 4, (heads, tokens, head_dim)).astype(np.float32)
    symbols = np.full(coefficients.size, POISON, np.int32)
    position = plan["start"][:-1].copy()
    streams.quantize(
        coefficients.reshape(-1), head_dim, plan["column_offset"], plan["run_start"], plan["row_class"],
        1 / plan["step"], plan["stream_of"], position, symbols,
    )  # fmt: skip
    assert (position == plan["start"][1:]).all()
    assert (symbols == naive_streams(coefficients, plan)).all()

    back = np.full_like(coefficients, np.nan)
    streams.dequantize(
        symbols, plan["start"][:-1].copy(), plan["stream_of"], plan["step"], plan["row_class"], plan["run_start"],
        plan["column_offset"], head_dim, back.reshape(-1),
    )  # fmt: skip
    half_step = plan["step"][plan["row_class"]][None, :, None] / 2
    assert (np.abs(back - coefficients) <= half_step * 1.0001).all()


@pytest.mark.parametrize("count", [0, 1, 7, 64, 1001])
@pytest.mark.parametrize("raw_bits", [0, 1, 3, 8, 13, 24])
def test_splitting_and_joining_are_inverse_and_raw_bits_are_the_lowest(count: int, raw_bits: int) -> None:
    generator = np.random.default_rng(count)
    symbols = (generator.normal(0, 40, count) * 2.0**raw_bits).astype(np.int32)
    rest = symbols.copy()
    raw = np.full(-(-count * raw_bits // 32), 0xDEADBEEF, np.uint32)
    outside, values = np.empty(count, np.uint32), np.empty(count, np.int32)
    found = streams.split(rest, 100, raw_bits, raw, outside, values)
    high = symbols >> raw_bits
    assert (outside[:found] == np.flatnonzero(np.abs(high) > 100)).all()
    assert (rest == np.where(np.abs(high) > 100, 0, high)).all()
    bits = np.unpackbits(raw.view(np.uint8), bitorder="little")[: count * raw_bits].reshape(count, raw_bits)
    assert ((bits.astype(np.int64) << np.arange(raw_bits)).sum(axis=1) == symbols & ((1 << raw_bits) - 1)).all()
    assert streams.join(rest, raw_bits, raw, outside[:found], values[:found])
    assert (rest == symbols).all()


def test_an_exception_outside_its_stream_is_noticed() -> None:
    nothing = np.empty(0, np.uint32)
    for index in (5, 2**32 - 1):
        outside, values = np.array([index], np.uint32), np.array([9], np.int32)
        assert not streams.join(np.zeros(5, np.int32), 0, nothing, outside, values)


@pytest.mark.parametrize(("per_byte", "limit"), [(1, 127), (2, 7), (3, 2), (5, 1)])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 333])
def test_packed_bytes_are_numbers_to_the_base(per_byte: int, limit: int, count: int) -> None:
    symbols = np.random.default_rng(count).integers(-limit, limit + 1, count).astype(np.int32)
    packed = np.full(-(-count // per_byte), 201, np.uint8)
    streams.pack(symbols, per_byte, limit, packed)
    base = 2 * limit + 1
    for position, byte in enumerate(packed):
        digits = symbols[position * per_byte : (position + 1) * per_byte] + limit
        assert byte == sum(int(digit) * base**place for place, digit in enumerate(digits))
    table = (np.arange(256)[:, None] // base ** np.arange(per_byte) % base - limit).astype(np.int8)
    back = np.full(count, POISON, np.int32)
    streams.unpack(packed, table, back)
    assert (back == symbols).all()


@pytest.mark.parametrize(("heads", "tokens", "head_dim"), [(1, 1, 2), (3, 7, 64), (2, 33, 80)])
def test_rotation_is_that_of_complex_numbers(heads: int, tokens: int, head_dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(tokens, heads + 1, head_dim, generator=generator)
    states = wide.transpose(0, 1)[1:]
    angle = torch.rand(tokens, head_dim // 2, generator=generator) * 6
    rotated = torch.full((heads, tokens, head_dim), torch.nan)
    streams.rotate(states.numpy(), angle.cos().numpy(), angle.sin().numpy(), np.float32(1.5), rotated.numpy())
    half = head_dim // 2
    turned = torch.complex(states[..., :half], states[..., half:]) * torch.polar(torch.ones_like(angle), angle) * 1.5
    torch.testing.assert_close(rotated, torch.cat([turned.real, turned.imag], dim=-1), atol=1e-5, rtol=1e-5)
