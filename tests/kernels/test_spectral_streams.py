"""The loops of the spectral codec against plain numpy and torch."""

import numpy as np
import pytest

from spectrumkv.kernels import spectral_streams as streams

POISON = np.iinfo(np.int32).min


def layout(rows: int, tokens: int, runs: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows in a random order, cut into runs; tokens of five classes, one of them empty; streams by class and run."""
    generator = np.random.default_rng(seed)
    cuts = np.sort(generator.choice(np.arange(1, rows), runs - 1, replace=False))
    run_start = np.concatenate(([0], cuts, [rows])).astype(np.int64)
    of_each = np.bincount(generator.choice([0, 1, 3, 4], tokens), minlength=5)
    stream_of = np.arange(5)[::-1, None] + np.arange(runs)[None, :]
    counts = np.bincount(stream_of.ravel(), (of_each[:, None] * np.diff(run_start)[None, :]).ravel())
    return {
        "row_order": generator.permutation(rows),
        "run_start": run_start,
        "class_start": np.concatenate(([0], np.cumsum(of_each))),
        "stream_of": stream_of,
        "start": np.concatenate(([0], np.cumsum(counts))).astype(np.int64),
        "step": np.exp2(np.arange(5) / 2 - 3).astype(np.float32),
    }


def naive_streams(coefficients: np.ndarray, plan: dict[str, np.ndarray]) -> np.ndarray:
    """Class by class, run by run, row by row, appended to lists."""
    lists: list[list[int]] = [[] for _ in range(len(plan["start"]) - 1)]
    for number, step in enumerate(plan["step"]):
        tokens = slice(plan["class_start"][number], plan["class_start"][number + 1])
        for run in range(len(plan["run_start"]) - 1):
            for row in plan["row_order"][plan["run_start"][run] : plan["run_start"][run + 1]]:
                scaled = np.rint(coefficients[row, tokens] * (1 / step)).astype(np.int32)
                lists[plan["stream_of"][number, run]] += scaled.tolist()
    return np.array([symbol for one in lists for symbol in one], np.int32)


@pytest.mark.parametrize(("rows", "tokens", "runs"), [(32, 1, 2), (192, 17, 5), (400, 333, 11)])
@pytest.mark.parametrize("largest", [4.0, 2.0**26])
def test_coefficients_are_sorted_into_streams_and_back(rows: int, tokens: int, runs: int, largest: float) -> None:
    plan = layout(rows, tokens, runs)
    coefficients = np.random.default_rng(1).normal(0, largest, (rows, tokens)).clip(-largest, largest)
    coefficients = coefficients.astype(np.float32)
    symbols = np.full(coefficients.size, POISON, np.int32)
    position = plan["start"][:-1].copy()
    places = plan["row_order"], plan["run_start"], plan["class_start"]
    streams.quantize(coefficients, *places, 1 / plan["step"], plan["stream_of"], position, symbols)
    assert (position == plan["start"][1:]).all()
    assert (symbols == naive_streams(coefficients, plan)).all()

    back = np.full_like(coefficients, np.nan)
    position = plan["start"][:-1].copy()
    streams.dequantize(symbols, *places, plan["step"], plan["stream_of"], position, back)
    half_step = np.repeat(plan["step"], np.diff(plan["class_start"]))[None, :] / 2
    assert (np.abs(back - coefficients) <= half_step * 1.0001 + np.abs(coefficients) * 2.0**-22).all()


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
@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 6, 16, 333])
def test_packed_bytes_are_numbers_to_the_base(per_byte: int, limit: int, count: int) -> None:
    symbols = np.random.default_rng(count).integers(-limit, limit + 1, count).astype(np.int32)
    size, base = -(-count // per_byte), 2 * limit + 1
    packed = np.full(size, 201, np.uint8)
    streams.pack(symbols, per_byte, limit, packed)
    for position, byte in enumerate(packed):
        digits = symbols[position::size] + limit
        assert byte == sum(int(digit) * base**place for place, digit in enumerate(digits))
    back = np.full(count, POISON, np.int32)
    streams.unpack(packed, per_byte, limit, back)
    assert (back == symbols).all()


@pytest.mark.parametrize(("per_byte", "limit"), [(1, 127), (2, 7), (3, 2), (5, 1)])
def test_every_byte_unpacks_to_its_digits(per_byte: int, limit: int) -> None:
    base, bytes_ = 2 * limit + 1, np.arange(256, dtype=np.uint8)
    symbols = np.full(256 * per_byte, POISON, np.int32)
    streams.unpack(bytes_, per_byte, limit, symbols)
    for digit in range(per_byte):
        assert (symbols[256 * digit :][:256] == np.arange(256) // base**digit % base - limit).all()
