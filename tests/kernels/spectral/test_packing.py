"""What the entropy coder takes, made of streams of integers, against plain numpy."""

import numpy as np
import pytest

from spectrumkv.kernels.spectral import packing

POISON = np.iinfo(np.int32).min


@pytest.mark.parametrize("count", [0, 1, 7, 64, 1001])
@pytest.mark.parametrize("raw_bits", [0, 1, 3, 8, 13, 24])
def test_splitting_and_joining_are_inverse_and_raw_bits_are_the_lowest(count: int, raw_bits: int) -> None:
    generator = np.random.default_rng(count)
    symbols = (generator.normal(0, 40, count) * 2.0**raw_bits).astype(np.int32)
    rest = symbols.copy()
    raw = np.full(-(-count * raw_bits // 32), 0xDEADBEEF, np.uint32)
    outside = np.full((count, 2), POISON, np.int32)
    found = packing.split(rest, 100, raw_bits, raw, outside)
    high = symbols >> raw_bits
    assert (outside[:found, 0] == np.flatnonzero(np.abs(high) > 100)).all()
    assert (outside[:found, 1] == high[np.abs(high) > 100]).all()
    assert (outside[found:] == POISON).all()
    assert (rest == np.where(np.abs(high) > 100, 0, high)).all()
    bits = np.unpackbits(raw.view(np.uint8), bitorder="little")[: count * raw_bits].reshape(count, raw_bits)
    assert ((bits.astype(np.int64) << np.arange(raw_bits)).sum(axis=1) == symbols & ((1 << raw_bits) - 1)).all()
    assert packing.join(rest, raw_bits, raw, outside[:found])
    assert (rest == symbols).all()


def test_an_exception_outside_its_stream_is_noticed() -> None:
    for index in (5, 2**31 - 1, -1, -5, -(2**31)):
        outside = np.array([[0, 3], [index, 9]], np.int32)
        assert not packing.join(np.zeros(5, np.int32), 0, np.empty(0, np.uint32), outside)


@pytest.mark.parametrize(("per_byte", "limit"), [(1, 127), (2, 7), (3, 2), (5, 1)])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 6, 16, 333])
def test_packed_bytes_are_numbers_to_the_base(per_byte: int, limit: int, count: int) -> None:
    symbols = np.random.default_rng(count).integers(-limit, limit + 1, count).astype(np.int32)
    size, base = -(-count // per_byte), 2 * limit + 1
    packed = np.full(size, 201, np.uint8)
    packing.pack(symbols, per_byte, limit, packed)
    for position, byte in enumerate(packed):
        digits = symbols[position::size] + limit
        assert byte == sum(int(digit) * base**place for place, digit in enumerate(digits))
    back = np.full(count, POISON, np.int32)
    packing.unpack(packed, per_byte, limit, back)
    assert (back == symbols).all()


@pytest.mark.parametrize(("per_byte", "limit"), [(1, 127), (2, 7), (3, 2), (5, 1)])
def test_every_byte_unpacks_to_its_digits(per_byte: int, limit: int) -> None:
    base, bytes_ = 2 * limit + 1, np.arange(256, dtype=np.uint8)
    symbols = np.full(256 * per_byte, POISON, np.int32)
    packing.unpack(bytes_, per_byte, limit, symbols)
    for digit in range(per_byte):
        assert (symbols[256 * digit :][:256] == np.arange(256) // base**digit % base - limit).all()


def edges(lengths: list[int]) -> np.ndarray:
    return np.cumsum([0, *lengths])


@pytest.mark.parametrize("seed", range(4))
def test_streams_are_laid_out_one_after_another(seed: int) -> None:
    generator = np.random.default_rng(seed)
    counts, exponent = generator.choice([0, 1, 7, 31, 500], 40), generator.uniform(-9, 40, 40)
    widest, per, limits = np.array([-4.0, -1.0, np.inf]), np.array([0, 3, 1]), np.array([0, 2, 127])
    start, packed_start, raw_start = (np.full(41, POISON, np.int64) for _ in range(3))
    per_byte, limit, raw_bits, raw_bytes = (np.full(40, POISON, np.int64) for _ in range(4))
    chosen = per_byte, limit, raw_bits, raw_bytes
    packing.lay_out(counts, exponent, widest, per, limits, 4.5, 24, start, *chosen, packed_start, raw_start)
    wanted = np.searchsorted(widest, exponent)
    assert (per_byte == per[wanted]).all()
    assert (limit == limits[wanted]).all()
    assert (raw_bits == np.clip(np.ceil(exponent - 4.5), 0, 24)).all()
    assert (raw_bytes == np.ceil(counts * raw_bits / 8)).all()
    assert (start == edges(counts.tolist())).all()
    assert (raw_start == edges(np.ceil(counts * raw_bits / 32).astype(int).tolist())).all()
    bytes_of_each = np.where(per_byte > 0, np.ceil(counts / np.maximum(per_byte, 1)), 0)
    assert (packed_start == edges(bytes_of_each.astype(int).tolist())).all()


@pytest.mark.parametrize("seed", range(4))
def test_the_streams_of_a_segment_are_packed_each_as_if_alone(seed: int) -> None:
    generator = np.random.default_rng(seed)
    counts = generator.choice([0, 1, 2, 31, 500], 9)
    codes = np.array([(0, 0, 0), (5, 1, 0), (3, 2, 0), (2, 7, 0), (1, 127, 0), (1, 127, 5)])[
        generator.permutation(9) % 6
    ]
    per_byte, limit, raw_bits = np.ascontiguousarray(codes.T)
    symbols = generator.normal(0, 3.0 ** generator.uniform(0, 6, counts.sum())).astype(np.int32)
    start = edges(counts.tolist())
    packed_start = edges([-(-count // per) if per else 0 for count, per in zip(counts, per_byte, strict=True)])
    raw_start = edges([-(-count * bits // 32) for count, bits in zip(counts, raw_bits, strict=True)])
    packed, raw = np.full(packed_start[-1], 201, np.uint8), np.full(raw_start[-1], 0xDEADBEEF, np.uint32)
    outside, found = np.full((len(symbols), 2), POISON, np.int32), np.full(9, -1)
    rest = symbols.copy()
    packing.pack_streams(rest, start, per_byte, limit, raw_bits, packed, packed_start, raw, raw_start, outside, found)
    for place in range(9):
        own, count = symbols[start[place] : start[place + 1]].copy(), counts[place]
        words, pairs = np.empty(-(-count * raw_bits[place] // 32), np.uint32), np.empty((count, 2), np.int32)
        assert packing.split(own, limit[place], raw_bits[place], words, pairs) == found[place]
        assert (outside[start[place] :][: found[place]] == pairs[: found[place]]).all()
        assert (raw[raw_start[place] : raw_start[place + 1]] == words).all()
        bytes_ = packed[packed_start[place] : packed_start[place + 1]]
        alone = np.empty_like(bytes_)
        if per_byte[place]:
            packing.pack(own, per_byte[place], limit[place], alone)
        assert (bytes_ == alone).all()

    pairs = np.concatenate([outside[first:][:count] for first, count in zip(start, found, strict=False)])
    back = np.full(len(symbols), POISON, np.int32)
    arguments = packed, packed_start, raw, raw_start, pairs, edges(found.tolist()), per_byte, limit, raw_bits, start
    assert packing.unpack_streams(*arguments, back) == -1
    assert (back == symbols).all()
    if len(pairs):
        pairs[-1, 0] = counts[np.flatnonzero(found)[-1]]
        assert packing.unpack_streams(*arguments, back) == np.flatnonzero(found)[-1]
