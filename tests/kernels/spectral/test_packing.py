"""What the entropy coder takes, made of streams of integers, against plain numpy."""

import numpy as np
import pytest

from spectrumkv.kernels.spectral import packing
from spectrumkv.kernels.spectral.gaps import pack_gaps

POISON = np.iinfo(np.int32).min
# Index of a stream's first symbol in its segment.
START = 70_000


@pytest.mark.parametrize("count", [0, 1, 7, 64, 1001])
@pytest.mark.parametrize("raw_bits", [0, 1, 3, 8, 13, 24])
def test_splitting_and_joining_are_inverse_and_raw_bits_are_the_lowest(count: int, raw_bits: int) -> None:
    generator = np.random.default_rng(count)
    symbols = (generator.normal(0, 40, count) * 2.0**raw_bits).astype(np.int32)
    rest = symbols.copy()
    raw = np.full(-(-count * raw_bits // 32), 0xDEADBEEF, np.uint32)
    outside = np.full((count, 2), POISON, np.int32)
    found = packing.split(rest, START, 100, raw_bits, raw, outside)
    high = symbols >> raw_bits
    assert (outside[:found, 0] == START + np.flatnonzero(np.abs(high) > 100)).all()
    assert (outside[:found, 1] == high[np.abs(high) > 100]).all()
    assert (outside[found:] == POISON).all()
    assert (rest == np.where(np.abs(high) > 100, 0, high)).all()
    bits = np.unpackbits(raw.view(np.uint8), bitorder="little")[: count * raw_bits].reshape(count, raw_bits)
    assert ((bits.astype(np.int64) << np.arange(raw_bits)).sum(axis=1) == symbols & ((1 << raw_bits) - 1)).all()
    packing.join(rest, START, raw_bits, raw, outside[:found])
    assert (rest == symbols).all()


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
def test_the_streams_of_a_segment_are_packed_each_as_if_alone(seed: int) -> None:
    generator = np.random.default_rng(seed)
    counts = generator.choice([0, 1, 2, 31, 500], 9)
    codes = np.array([(0, 0, 0), (packing.GAPS, 1, 0), (3, 2, 0), (2, 7, 0), (1, 127, 0), (1, 127, 5)])[
        generator.permutation(9) % 6
    ]
    per_byte, limit, raw_bits = np.ascontiguousarray(codes.T)
    symbols = generator.normal(0, 3.0 ** generator.uniform(0, 6, counts.sum())).astype(np.int32)
    start = edges(counts.tolist())
    room = np.array([-(-count // abs(per)) if per else 0 for count, per in zip(counts, per_byte, strict=True)])
    # In another order than the streams, and with something between them.
    packed_start = generator.permutation(9) * 600
    raw_start = edges([-(-count * bits // 32) for count, bits in zip(counts, raw_bits, strict=True)])
    packed, raw = np.full(9 * 600, 201, np.uint8), np.full(raw_start[-1], 0xDEADBEEF, np.uint32)
    outside, taken = np.full((len(symbols), 2), POISON, np.int32), room.copy()
    rest = symbols.copy()
    found = packing.pack_streams(
        rest, start, per_byte, limit, raw_bits, packed, packed_start, taken, raw, raw_start, outside
    )
    assert (outside[found:] == POISON).all()
    assert (np.diff(outside[:found, 0]) > 0).all()
    untouched = np.ones(len(packed), bool)
    for place in range(9):
        own, count = symbols[start[place] : start[place + 1]].copy(), counts[place]
        words, pairs = np.empty(-(-count * raw_bits[place] // 32), np.uint32), np.empty((count, 2), np.int32)
        alone = packing.split(own, start[place], limit[place], raw_bits[place], words, pairs)
        mine = (outside[:found, 0] >= start[place]) & (outside[:found, 0] < start[place + 1])
        assert (outside[:found][mine] == pairs[:alone]).all()
        assert (raw[raw_start[place] : raw_start[place + 1]] == words).all()
        bytes_ = np.full(room[place], 201, np.uint8)
        if per_byte[place] == packing.GAPS:
            assert taken[place] == pack_gaps(own, bytes_)
        elif per_byte[place]:
            packing.pack(own, per_byte[place], limit[place], bytes_)
            assert taken[place] == room[place]
        span = slice(packed_start[place], packed_start[place] + room[place])
        assert (packed[span] == bytes_).all()
        untouched[span] = False
    assert (packed[untouched] == 201).all()

    back, pairs = np.full(len(symbols), POISON, np.int32), outside[:found].copy()
    arguments = packed, packed_start, taken, raw, raw_start, pairs, per_byte, limit, raw_bits, start
    assert packing.unpack_streams(*arguments, back)
    assert (back == symbols).all()
    if found:
        for index in (len(symbols), -1, 2**31 - 1, -(2**31)):
            pairs[-1, 0] = index
            assert not packing.unpack_streams(*arguments, back)
    if found > 1:
        pairs[-1, 0] = pairs[-2, 0]
        assert not packing.unpack_streams(*arguments, back)
