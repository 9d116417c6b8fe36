"""Gaps between the integers that are not 0, against plain Python."""

import numpy as np
import pytest

from spectrumkv.kernels.spectral.gaps import LONG_GAP, LONGEST, pack_gaps, unpack_gaps

POISON = np.iinfo(np.int32).min


def naive(symbols: np.ndarray) -> list[int]:
    """Zeros one by one, and what they end with."""
    codes, zeros = [], 0
    for symbol in symbols.tolist():
        if symbol:
            codes.append(2 * zeros + (symbol < 0))
            zeros = 0
            continue
        zeros += 1
    spread: list[int] = []
    for code in codes:
        spread += [LONG_GAP] * (code // 2 // LONGEST)
        spread.append(code % LONG_GAP)
    return spread


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 125, 126, 127, 252, 253, 4001])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.3, 1.0])
def test_gaps_are_zeros_before_each_integer_and_come_back(count: int, share: float) -> None:
    generator = np.random.default_rng(count)
    symbols = (generator.choice([-1, 1], count) * (generator.random(count) < share)).astype(np.int32)
    packed = np.full(count, 201, np.uint8)
    written = pack_gaps(symbols, packed)
    assert packed[:written].tolist() == naive(symbols)
    assert (packed[written:] == 201).all()
    back = np.full(count, POISON, np.int32)
    assert unpack_gaps(packed[:written], back)
    assert (back == symbols).all()


@pytest.mark.parametrize("place", [0, 125, 126, 251, 252, 378])
def test_a_lone_integer_is_found_wherever_it_is(place: int) -> None:
    symbols = np.zeros(379, np.int32)
    symbols[place] = -1
    packed = np.empty(379, np.uint8)
    written = pack_gaps(symbols, packed)
    assert written == place // LONGEST + 1
    back = np.full(379, POISON, np.int32)
    assert unpack_gaps(packed[:written], back)
    assert (back == symbols).all()


@pytest.mark.parametrize(
    ("codes", "fits"),
    [
        *(([], True), ([252], True), ([252, 252], False), ([240], True), ([252, 146], True), ([252, 148], False)),
        *(([253], False), ([255], False), ([0] * 200, True), ([0] * 201, False)),
    ],
)
def test_gaps_beyond_the_stream_are_noticed(codes: list[int], fits: bool) -> None:
    assert unpack_gaps(np.array(codes, np.uint8), np.full(200, POISON, np.int32)) == fits
