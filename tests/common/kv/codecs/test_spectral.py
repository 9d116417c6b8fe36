from contextlib import suppress
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from spectrumkv.common.errors import DataLossError, InvalidArgumentError, NotFiniteError
from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.kv.codecs.base import basis_types, codecs, parse_basis
from spectrumkv.common.kv.codecs.calibrated.basis import SpectralBasis, angles
from spectrumkv.common.kv.codecs.spectral.codec import SpectralDecoder
from spectrumkv.common.kv.codecs.spectral.layout import TokenClasses, expected_bits
from spectrumkv.common.kv.codecs.spectral.segment_codec import UncodedSegment, decode_segment, encode_segment
from spectrumkv.common.kv.codecs.spectral.symbols import EXCEPTION, PACKINGS, PackedStreams, compress, decompress
from spectrumkv.common.kv.codecs.spectral.transform import LayerTransform
from spectrumkv.common.kv.segment import KvSegment
from spectrumkv.common.kv.tiers import Tier
from spectrumkv.kernels.spectral.packing import GAPS
from tests.common.kv.codecs.spectral_prompts import basis_of, capture, encoder_of, geometry, plain_coefficients


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


@pytest.mark.parametrize(("kv_heads", "head_dim"), [(1, 64), (3, 80), (2, 128)])
@pytest.mark.parametrize("tokens", [1, 3, 17, 65, 500])
def test_a_segment_is_exact_up_to_half_a_step(kv_heads: int, head_dim: int, tokens: int) -> None:
    shape = geometry(kv_heads, head_dim)
    basis = basis_of(shape)
    first = 300
    seen = capture(basis, layer=1, tokens=tokens, first=first)
    transform = LayerTransform(basis, 1)
    classes = np.random.default_rng(0).integers(-12, 4, tokens)
    sinks = min(2, tokens)
    segment = UncodedSegment(transform, first, seen.keys, seen.values, TokenClasses(classes, sinks))
    body, steps = encode_segment(segment, -1.5, shape)
    assert len(body) % 2 == 0
    keys, values = torch.full((2, kv_heads, tokens, head_dim), torch.nan)
    read = decode_segment(transform, memoryview(body), first, shape, keys, values)
    assert (read.base, read.tokens.sinks) == (steps.base, sinks) == (-1.5, sinks)
    assert (read.tokens.coded == classes[sinks:] + 12).all()
    assert torch.equal(keys[:, :sinks], seen.keys[:, :sinks].half().float())
    assert torch.equal(values[:, :sinks], seen.values[:, :sinks].half().float())
    error = plain_coefficients(basis, 1, keys, values, first) - plain_coefficients(
        basis, 1, seen.keys, seen.values, first
    )
    allowed = 2.0 ** (-1.5 + classes[sinks:] / 2) / 2
    # Coefficients that are expected to be far below half a step are not sent at all.
    assert (error[:, :, sinks:].abs().amax(dim=(0, 1, 3)).numpy() <= allowed * 1.05 + 1e-2).all()


def test_steps_too_fine_for_integers_of_32_bits_are_made_coarser() -> None:
    shape = geometry()
    basis = basis_of(shape)
    seen = capture(basis, layer=0, tokens=30)
    seen.keys[1, 11] *= 1e9
    transform = LayerTransform(basis, 0)
    segment = UncodedSegment(transform, 0, seen.keys, seen.values, TokenClasses(np.zeros(30, np.int64), 1))
    body, steps = encode_segment(segment, -6.0, shape)
    largest = float(plain_coefficients(basis, 0, seen.keys, seen.values, 0).abs().max())
    # Classes reach six octaves below class 0, and integers 2^30.
    assert abs(steps.base - (np.log2(largest) - 30 + 6)) < 1e-4
    keys, values = torch.full((2, 2, 30, 16), torch.nan)
    decode_segment(transform, memoryview(body), 0, shape, keys, values)
    torch.testing.assert_close(keys[1, 11], seen.keys[1, 11], rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("tokens", "mismatch"),
    [(300, 1.0), pytest.param(300, 0.5, marks=pytest.mark.slow), pytest.param(1500, 1.6, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("budget", [0.1, 0.3])
def test_a_budget_is_met_and_never_exceeded(tokens: int, budget: float, mismatch: float) -> None:
    shape = geometry(kv_heads=2, head_dim=64, layers=4)
    basis = basis_of(shape)
    encoder = encoder_of(basis, shape, tokens, budget)
    decoder = SpectralDecoder(basis, shape)
    sent = 0
    for layer in range(shape.layers):
        segments = list(encoder.encode(capture(basis, layer, tokens, mismatch)))
        sent += sum(segment.wire_bytes for segment in segments)
        assert sum(segment.tiers.numel() for segment in segments) == tokens
        for segment in segments:
            received = torch.full((2, shape.kv_heads, segment.tiers.numel(), shape.head_dim), torch.nan)
            assert decoder.decode(segment, received[0], received[1]) == segment.tier_bytes
            assert received.isfinite().all()
            assert sum(segment.tier_bytes.values()) == segment.body.numel()
    share = sent / shape.fp16_bytes(tokens)
    assert 0.99 * budget <= share <= budget


def test_important_tokens_are_finer() -> None:
    shape = geometry(kv_heads=1, head_dim=64, layers=1)
    basis = basis_of(shape)
    seen = capture(basis, 0, 256)
    # The last query looks at token 100 and at nothing else.
    loud = LayerCapture(seen.keys[:, 100:101].repeat(2, 8, 1) * 10, seen.keys, seen.values, 0.5, None, None, 0)
    [segment] = encoder_of(basis, shape, 256, 0.2).encode(loud)
    received = torch.empty(2, 1, 256, 64)
    SpectralDecoder(basis, shape).decode(segment, received[0], received[1])
    error = (received[1] - seen.values).square().mean(dim=(0, 2))
    assert error[100] < error[4:].median() / 8


@cache
def encoded() -> tuple[KvSegment, SpectralDecoder]:
    shape = geometry()
    basis = basis_of(shape)
    [segment] = encoder_of(basis, shape, 40, 0.4).encode(capture(basis, 0, 40))
    return segment, SpectralDecoder(basis, shape)


@settings(max_examples=300)
@given(st.data())
def test_a_damaged_body_is_an_error_or_decodes_and_never_anything_else(data: st.DataObject) -> None:
    segment, decoder = encoded()
    body = bytearray(segment.body.numpy().tobytes())
    for _ in range(data.draw(st.integers(1, 3))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    del body[data.draw(st.integers(0, len(body))) :]
    damaged = KvSegment(0, 0, segment.tiers, torch.tensor(list(body), dtype=torch.uint8))
    states = torch.empty(2, 2, 40, 16)
    with suppress(DataLossError):
        decoder.decode(damaged, states[0], states[1])


def test_infinite_states_are_refused() -> None:
    shape = geometry()
    basis = basis_of(shape)
    seen = capture(basis, 0, 40)
    seen.keys[0, 7, 3] = torch.inf
    with pytest.raises(NotFiniteError, match="layer 0"):
        list(encoder_of(basis, shape, 40, 0.4).encode(seen))


@pytest.mark.parametrize("magnitude", [1e9, 1e20, 1e28, 1e32])
def test_states_are_refused_or_decoded_however_large(magnitude: float) -> None:
    shape = geometry(layers=1)
    transform = LayerTransform(basis_of(shape), 0)
    keys = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(0)) * magnitude
    received = torch.full((2, *keys.shape), torch.nan)
    segment = UncodedSegment(transform, 0, keys, keys, TokenClasses(np.zeros(40, np.int64), 0))
    if magnitude > 1e20:
        with pytest.raises(InvalidArgumentError, match="layer 0"):
            encode_segment(segment, 0.0, shape)
        return
    body, _ = encode_segment(segment, 0.0, shape)
    decode_segment(transform, memoryview(body), 0, shape, received[0], received[1])
    torch.testing.assert_close(received[0] / magnitude, keys / magnitude, rtol=0, atol=1e-3)


@pytest.mark.parametrize("base", [0.0, 8.0, 10.0])
def test_a_finite_float16_does_not_come_back_infinite(base: float) -> None:
    shape = replace(geometry(head_dim=64, layers=1), native_dtype=torch.float16)
    transform = LayerTransform(basis_of(shape), 0)
    states = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(0)).mul(100).half()
    states[0, 7, 3], states[1, 9, 5] = 65504.0, -65504.0
    body, _ = encode_segment(
        UncodedSegment(transform, 0, states, states, TokenClasses(np.zeros(40, np.int64), 4)), base, shape
    )
    received = torch.full((2, *states.shape), torch.nan, dtype=torch.float16)
    decode_segment(transform, memoryview(body), 0, shape, received[0], received[1])
    assert received.isfinite().all()


def test_a_token_that_is_not_sent_is_refused() -> None:
    segment, decoder = encoded()
    tiers = segment.tiers.clone()
    tiers[3] = Tier.DROP
    states = torch.empty(2, 2, 40, 16)
    with pytest.raises(DataLossError, match="sends every token"):
        decoder.decode(KvSegment(0, 0, tiers, segment.body), states[0], states[1])


def test_a_basis_is_read_without_knowing_its_type() -> None:
    shape = geometry()
    basis = basis_of(shape)
    [kind] = basis_types()
    assert len(basis.serialized) <= kind.largest_bytes(shape)
    read = parse_basis(basis.serialized, shape)
    assert type(read) is codecs.get("spectral").basis_type
    assert read.digest == basis.digest
    read.prepare_decoding()
    assert read.memory_bytes <= 2 * len(basis.serialized)
    with pytest.raises(InvalidArgumentError, match="no spectral basis"):
        parse_basis(b"nonsense", shape)
    with pytest.raises(InvalidArgumentError, match="the model has"):
        parse_basis(basis.serialized, geometry(head_dim=32))
    flat = replace(basis, analysis=torch.zeros_like(basis.analysis))
    with pytest.raises(InvalidArgumentError, match="cannot be undone"):
        parse_basis(flat.serialized, shape).prepare_decoding()


@pytest.mark.parametrize(
    ("name", "rotation"),
    [
        # One rotation for all layers, as bases had it before layers could differ.
        ("rope_frequencies", torch.ones(8, dtype=torch.float64)),
        ("rope_scaling", torch.ones(1, dtype=torch.float64)),
        ("rope_frequencies", torch.ones(3, 8)),
        ("rope_frequencies", torch.full((3, 8), torch.nan, dtype=torch.float64)),
    ],
)
def test_a_basis_has_a_rotation_for_each_layer(name: str, rotation: torch.Tensor) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"basis's {name} is .*it must be torch.float64 \[3"):
        SpectralBasis.from_bytes(save(load(basis_of(geometry()).serialized) | {name: rotation}))


@given(first=st.integers(0, 700), tokens=st.integers(1, 700))
def test_angles_are_those_of_the_positions(first: int, tokens: int) -> None:
    frequencies = (1.0, 0.37, 1e-4)
    turned = torch.arange(first, first + tokens).double()[:, None] * torch.tensor(frequencies, dtype=torch.float64)
    cosine, sine = angles(frequencies, first, tokens)
    torch.testing.assert_close(cosine, turned.cos().float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(sine, turned.sin().float(), rtol=0, atol=1e-6)


def test_a_basis_travels() -> None:
    basis = basis_of(geometry())
    back = SpectralBasis.from_bytes(basis.serialized)
    assert back.digest == basis.digest
    assert torch.equal(back.analysis, basis.analysis)
    assert torch.equal(back.rope_frequencies, basis.rope_frequencies)
    assert torch.equal(back.rope_scaling, basis.rope_scaling)
    torch.testing.assert_close(
        basis.analysis @ basis.synthesis, torch.eye(16).expand_as(basis.analysis), atol=1e-4, rtol=0
    )
    with pytest.raises(InvalidArgumentError, match="no spectral basis"):
        SpectralBasis.from_bytes(b"nonsense")
    with pytest.raises(InvalidArgumentError, match=r"\(3, 2, 16\); the model has \(3, 2, 32\)"):
        basis.check_fits(geometry(head_dim=32))
