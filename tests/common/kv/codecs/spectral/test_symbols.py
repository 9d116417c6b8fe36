import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectrumkv.common.errors import DataLossError
from spectrumkv.common.kv.codecs.spectral.layout import expected_bits
from spectrumkv.common.kv.codecs.spectral.symbols import EXCEPTION, PACKINGS, PackedStreams, compress, decompress
from spectrumkv.kernels.spectral.packing import GAPS


def packed_streams(lengths: list[int], exponents: list[float]) -> PackedStreams:
    return PackedStreams.of(np.array(lengths), np.array(exponents))


STREAM = st.lists(st.integers(-(2**30), 2**30) | st.integers(-200, 200) | st.just(0), max_size=120)


@given(st.floats(-8, 24), st.lists(STREAM, min_size=1, max_size=9))
def test_symbols_survive_every_packing(narrowest: float, streams: list[list[int]]) -> None:
    symbols = np.array([symbol for values in streams for symbol in values], dtype=np.int32)
    exponents = [narrowest + index / 2 for index in range(len(streams))]
    packed = packed_streams([len(values) for values in streams], exponents)
    coded = packed.encode(symbols.copy())
    assert (packed.decode(coded) == symbols).all()


@pytest.mark.parametrize("indices", [(12,), (2**32 - 1,), (2**31,), (3, 3), (4, 3), (0, 13)])
def test_exceptions_outside_the_segment_or_out_of_order_are_refused(indices: tuple[int, ...]) -> None:
    packed = packed_streams([3, 5, 4], [0.0, 0.5, 1.0])
    coded = packed.encode(np.arange(12, dtype=np.int32))
    harmed = coded._replace(exceptions=np.array([(index, 9) for index in indices], EXCEPTION).tobytes())
    with pytest.raises(DataLossError, match="a segment of 12 integers lie outside"):
        packed.decode(harmed)


def test_gaps_that_leave_their_stream_are_refused() -> None:
    packed = packed_streams([300, 5], [-3.0, -2.5])
    coded = packed.encode(np.zeros(305, np.int32))
    assert coded.gap_bytes == [0, 0]
    for first in (b"\xfc\xfc\x60", b"\xfc\xfc\xfc", b"\xfd", b"\xff"):
        harmed = coded._replace(gap_bytes=[len(first), 0], frames=[first, b""])
        with pytest.raises(DataLossError, match="a segment of 305 integers lie outside"):
            packed.decode(harmed)
    with pytest.raises(DataLossError, match="more gaps than integers"):
        packed.decode(coded._replace(gap_bytes=[301, 0], frames=[bytes(301), b""]))


def test_wide_streams_share_two_frames() -> None:
    exponents = [index / 2 for index in range(-10, 30)]
    packed = packed_streams([10] * 40, exponents)
    # From -3.5 to 3.5 each has its own.
    assert len(packed.frame_start) - 1 == 15 + 2
    # None of a stream that is not there.
    assert len(packed_streams([0, 10, 0], [0.0, 0.5, 1.0]).frame_start) == 2


@pytest.mark.parametrize(
    ("exponent", "per_byte", "limit", "raw_bits"),
    [
        *((-9.0, 0, 0, 0), (-4.0, 0, 0, 0), (-3.5, GAPS, 1, 0), (-1.5, GAPS, 1, 0)),
        *((-1.4, 3, 2, 0), (-1.0, 3, 2, 0)),
        *(
            (0.75, 2, 7, 0),
            (0.76, 1, 127, 0),
            (4.75, 1, 127, 0),
            (4.8, 1, 127, 1),
            (9.75, 1, 127, 5),
            (90.0, 1, 127, 24),
        ),
    ],
)
def test_the_std_decides_the_packing(exponent: float, per_byte: int, limit: int, raw_bits: int) -> None:
    packed = packed_streams([7], [exponent])
    assert (packed.per_byte[0], packed.limit[0], packed.raw_bits[0]) == (per_byte, limit, raw_bits)


def test_packed_symbols_fit_a_byte() -> None:
    assert all(packing.base**packing.per_byte <= 256 for packing in PACKINGS if packing.per_byte != GAPS)


@given(st.binary(max_size=2000))
def test_compressed_bytes_come_back(data: bytes) -> None:
    array = np.frombuffer(data, np.uint8)
    coded = compress(array)
    assert len(coded) <= len(data)
    assert decompress(memoryview(coded), len(data)).tobytes() == data
    with pytest.raises(DataLossError):
        decompress(memoryview(coded), len(data) + 1)


def test_a_frame_that_claims_a_terabyte_is_refused_before_memory_is_asked_for() -> None:
    # Eight bytes of content size, as in a Zstandard frame of a single segment.
    bomb = b"\xe0" + (1 << 40).to_bytes(8, "little") + b"\x01\x00\x00"
    with pytest.raises(DataLossError, match="frame header 0xe0"):
        decompress(memoryview(bomb), 1000)
    # A window of 2^31 bytes.
    with pytest.raises(DataLossError, match="damaged"):
        decompress(memoryview(b"\x00\xa8\x01\x00\x00"), 1000)


def test_entropy_coded_symbols_take_about_their_entropy() -> None:
    generator = np.random.default_rng(0)
    for exponent in (-2.5, -1.5, -0.5, 0.5, 2.0, 4.0, 7.0):
        symbols = np.rint(generator.normal(0, 2.0**exponent, 100_000)).astype(np.int32)
        coded = packed_streams([len(symbols)], [exponent]).encode(symbols)
        bits = 8 * (sum(map(len, coded.frames)) + len(coded.raw) + len(coded.exceptions)) / len(symbols)
        entropy = expected_bits(np.array([exponent]), 0.0, np.array([1]))
        assert bits <= 1.05 * entropy + 0.05, (exponent, bits, entropy)
