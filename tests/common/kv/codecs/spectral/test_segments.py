from contextlib import suppress
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrumkv.common.errors import DataLossError, InvalidArgumentError, NotFiniteError
from spectrumkv.common.kv.codecs.spectral.codec import SpectralDecoder
from spectrumkv.common.kv.codecs.spectral.layout import TokenClasses
from spectrumkv.common.kv.codecs.spectral.segment_codec import UncodedSegment, decode_segment, encode_segment
from spectrumkv.common.kv.codecs.spectral.transform import LayerTransform
from spectrumkv.common.kv.segment import KvSegment
from spectrumkv.common.kv.tiers import Tier
from tests.common.kv.codecs.spectral_prompts import basis_of, capture, encoder_of, geometry, plain_coefficients


@pytest.mark.parametrize(("kv_heads", "head_dim"), [(1, 64), (3, 80), (2, 128)])
@pytest.mark.parametrize("tokens", [1, 3, 17, 65, 500])
def test_a_segment_is_exact_up_to_a_step(kv_heads: int, head_dim: int, tokens: int) -> None:
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
    # The trellis may leave the nearest value for the one after it. Coefficients that are expected to be far below
    # half a step are not sent at all.
    allowed = 2.0 ** (-1.5 + classes[sinks:] / 2)
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
