from contextlib import suppress
from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrumkv.common.errors import DataLossError, InvalidArgumentError, NotFiniteError
from spectrumkv.common.kv.codecs import codecs
from spectrumkv.common.kv.codecs.calibrated.basis import CalibratedBasis
from spectrumkv.common.kv.codecs.calibrated.request import CalibratedRequest
from spectrumkv.common.kv.codecs.fixed_rate.codec import FixedRateDecoder
from spectrumkv.common.kv.codecs.fixed_rate.encoder import FixedRateEncoder
from spectrumkv.common.kv.codecs.fixed_rate.segment_codec import HEADER
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.policies import policies
from spectrumkv.common.kv.segment import MAX_CHUNK_PAYLOAD_BYTES, KvSegment
from spectrumkv.common.kv.tiers import Tier
from tests.common.kv.codecs.spectral_prompts import basis_of, capture, geometry, plain_coefficients


def encoder_of(basis: CalibratedBasis, shape: KvGeometry, tokens: int, budget: float) -> FixedRateEncoder:
    return FixedRateEncoder(
        CalibratedRequest(basis, shape, tokens, int(budget * shape.fp16_bytes(tokens)), "attention", 0)
    )


def sent(
    basis: CalibratedBasis, shape: KvGeometry, tokens: int, budget: float, tails: float = 0.0
) -> list[KvSegment]:
    """All segments of a prompt, each decoded and compared with what was sent."""
    encoder, decoder = encoder_of(basis, shape, tokens, budget), FixedRateDecoder(basis, shape)
    segments = []
    for layer in range(shape.layers):
        seen = capture(basis, layer, tokens)
        if tails:
            for states in (seen.keys, seen.values):
                states *= torch.randn(states.shape, generator=torch.Generator().manual_seed(1)).mul(tails).exp()
        following = 0
        for segment in encoder.encode(seen):
            assert segment.first_token == following
            following += segment.tiers.numel()
            received = torch.full((2, shape.kv_heads, segment.tiers.numel(), shape.head_dim), torch.nan)
            assert decoder.decode(segment, received[0], received[1]) == segment.tier_bytes
            assert received.isfinite().all()
            assert sum(segment.tier_bytes.values()) == segment.body.numel()
            assert segment.wire_bytes <= MAX_CHUNK_PAYLOAD_BYTES
            segments.append(segment)
        assert following == tokens
    return segments


GEOMETRIES = [(1, 64), (3, 64), (2, 80), (1, 96), (4, 128), (1, 256), (32, 64), (1, 6)]


@pytest.mark.parametrize(("kv_heads", "head_dim"), GEOMETRIES)
@pytest.mark.parametrize("tokens", [1, 3, 65, 300])
def test_every_shape_comes_back_within_its_budget(kv_heads: int, head_dim: int, tokens: int) -> None:
    shape = geometry(kv_heads, head_dim, layers=2)
    basis, budget = replace(basis_of(shape), rope_scaling=torch.full((2,), 1.25, dtype=torch.float64)), 0.4
    total = sum(segment.wire_bytes for segment in sent(basis, shape, tokens, budget))
    fixed = 2 * (16 + 16 + 6 * tokens)
    assert total <= max(budget * shape.fp16_bytes(tokens), fixed)


@pytest.mark.parametrize("tails", [0.0, 1.0])
@pytest.mark.parametrize("budget", [0.05, 0.1, 0.3, 0.5, 0.7])
def test_a_budget_is_met_within_a_thousandth_and_never_exceeded(budget: float, tails: float) -> None:
    shape, tokens = geometry(kv_heads=2, head_dim=64, layers=3), 700
    total = sum(segment.wire_bytes for segment in sent(basis_of(shape), shape, tokens, budget, tails))
    assert 0.999 * budget <= total / shape.fp16_bytes(tokens) <= budget


def test_more_than_the_widest_records_take_is_left_over() -> None:
    shape, tokens = geometry(kv_heads=1, head_dim=64, layers=2), 200
    total = sum(segment.wire_bytes for segment in sent(basis_of(shape), shape, tokens, 1.0))
    assert 0.8 <= total / shape.fp16_bytes(tokens) <= 1.0


@pytest.mark.slow
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(1, 64), (8, 128)])
def test_long_prompts_come_in_parts(kv_heads: int, head_dim: int) -> None:
    shape, tokens = geometry(kv_heads, head_dim, layers=2), 16_384
    segments = sent(basis_of(shape), shape, tokens, 0.3)
    total = sum(segment.wire_bytes for segment in segments)
    assert len(segments) > 2
    assert 0.999 * 0.3 <= total / shape.fp16_bytes(tokens) <= 0.3


def test_a_layer_that_takes_more_than_others_is_cut_smaller() -> None:
    shape, tokens = geometry(kv_heads=8, head_dim=128, layers=3), 400
    basis = basis_of(shape)
    std = basis.std.clone()
    std[1:] *= 2.0**-12
    basis = replace(basis, std=std)
    segments = sent(basis, shape, tokens, 0.35)
    assert len({segment.first_token for segment in segments if segment.layer == 0}) > 1


def test_errors_shrink_with_the_budget() -> None:
    shape, tokens = geometry(kv_heads=2, head_dim=64, layers=1), 500
    basis = basis_of(shape)
    seen, decoder = capture(basis, 0, tokens), FixedRateDecoder(basis_of(shape), shape)
    wanted = plain_coefficients(basis, 0, seen.keys, seen.values, 0)
    errors = []
    for budget in (0.1, 0.2, 0.3, 0.4, 0.5):
        [segment] = encoder_of(basis, shape, tokens, budget).encode(seen)
        received = torch.empty(2, 2, tokens, 64)
        decoder.decode(segment, received[0], received[1])
        error = plain_coefficients(basis, 0, received[0], received[1], 0) - wanted
        errors.append(float(error.square().mean()))
    # A bit an element less makes a quarter of the distortion: 0.1 of 16 bits are 1.6.
    assert all(finer < coarser / 4 for coarser, finer in pairwise(errors))


def test_the_same_layers_make_the_same_bytes_whatever_their_strides() -> None:
    shape, tokens = geometry(), 150
    basis = basis_of(shape)
    seen = capture(basis, 0, tokens)
    wide = [states.transpose(0, 1).contiguous().transpose(0, 1) for states in (seen.keys, seen.values)]
    [one] = encoder_of(basis, shape, tokens, 0.3).encode(seen)
    [other] = encoder_of(basis, shape, tokens, 0.3).encode(replace(seen, keys=wide[0], values=wide[1]))
    assert torch.equal(one.body, other.body)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("token", [0, 30])
def test_states_that_are_not_finite_are_refused(value: float, token: int) -> None:
    shape = geometry()
    basis = basis_of(shape)
    seen = capture(basis, 0, 40)
    seen.values[1, token, 3] = value
    with pytest.raises(NotFiniteError, match="layer 0"):
        list(encoder_of(basis, shape, 40, 0.4).encode(seen))


@pytest.mark.parametrize("tokens", [20, 400])
@pytest.mark.parametrize("magnitude", [1e-15, 1e9, 1e15, 1e20, 1e30])
def test_states_are_refused_or_come_back_however_large(magnitude: float, tokens: int) -> None:
    shape = geometry(layers=1)
    basis = basis_of(shape)
    seen = capture(basis, 0, tokens)
    quiet = replace(basis, mean=torch.zeros_like(basis.mean))
    large = replace(seen, keys=seen.keys * magnitude, values=seen.values * magnitude, queries=seen.queries * 0)
    # Sinks would not fit float16.
    encoder = FixedRateEncoder(
        CalibratedRequest(quiet, shape, tokens, int(0.6 * shape.fp16_bytes(tokens)), "position", 0)
    )
    encoder._sink_count = 0
    if magnitude >= 1e20:
        with pytest.raises(InvalidArgumentError, match=r"layer 0|too large|standard deviation is"):
            list(encoder.encode(large))
        return
    received = torch.full((2, *large.keys.shape), torch.nan)
    for segment in encoder.encode(large):
        FixedRateDecoder(quiet, shape).decode(segment, received[0], received[1])
    torch.testing.assert_close(received[0] / magnitude, seen.keys, rtol=0, atol=0.2)


def test_a_finite_float16_does_not_come_back_infinite() -> None:
    shape = replace(geometry(head_dim=64, layers=1), native_dtype=torch.float16)
    basis = basis_of(shape)
    seen = capture(basis, 0, 60)
    keys = seen.keys.mul(100).clamp(-65504, 65504).half()
    keys[0, 7, 3] = 65504.0
    [segment] = encoder_of(basis, shape, 60, 0.1).encode(replace(seen, keys=keys, values=keys, queries=keys[:, -1:]))
    received = torch.full((2, *keys.shape), torch.nan, dtype=torch.float16)
    FixedRateDecoder(basis, shape).decode(segment, received[0], received[1])
    assert received.isfinite().all()


@cache
def encoded(tokens: int) -> tuple[KvSegment, FixedRateDecoder]:
    shape = geometry()
    basis = basis_of(shape)
    seen = capture(basis, 0, tokens)
    # Some coefficients escape.
    seen.values.mul_(torch.randn(seen.values.shape, generator=torch.Generator().manual_seed(1)).exp())
    [segment] = encoder_of(basis, shape, tokens, 0.4).encode(seen)
    return segment, FixedRateDecoder(basis, shape)


@settings(max_examples=300)
@given(st.data())
def test_a_damaged_body_is_an_error_or_decodes_and_never_anything_else(data: st.DataObject) -> None:
    segment, decoder = encoded(data.draw(st.sampled_from([20, 120])))
    body = bytearray(segment.body.numpy().tobytes())
    for _ in range(data.draw(st.integers(1, 3))):
        body[data.draw(st.integers(0, len(body) - 1) | st.integers(0, HEADER.size - 1))] = data.draw(
            st.integers(0, 255)
        )
    del body[data.draw(st.integers(0, len(body)) | st.just(len(body))) :]
    damaged = KvSegment(0, 0, segment.tiers, torch.tensor(list(body), dtype=torch.uint8))
    states = torch.empty(2, 2, segment.tiers.numel(), 16)
    with suppress(DataLossError):
        decoder.decode(damaged, states[0], states[1])


def changed(segment: KvSegment, offset: int, value: int, size: int) -> KvSegment:
    body = segment.body.clone()
    body[offset : offset + size] = torch.tensor(list(value.to_bytes(size, "little")), dtype=torch.uint8)
    return replace(segment, body=body)


def test_a_body_that_contradicts_itself_is_refused() -> None:
    segment, decoder = encoded(120)
    states = torch.empty(2, 2, 120, 16)
    escapes = HEADER.unpack(segment.body[: HEADER.size].numpy().tobytes())[-1]
    assert escapes > 1
    last_index = segment.body.numel() - 4 * escapes - 4
    for damaged, message in (
        (changed(segment, 4, 121, 2), "has 121 sinks"),
        (changed(segment, 6, 2, 2), "scales of kind 2"),
        (changed(segment, 2, 5000, 2), "largest standard deviation has the exponent 5000"),
        (changed(segment, 12, escapes + 1, 4), "cut off"),
        (changed(segment, 12, escapes - 1, 4), "too many"),
        (changed(segment, last_index, 0, 4), "do not rise"),
        (changed(segment, last_index, 2**31, 4), "do not rise within"),
        (changed(segment, segment.body.numel() - 4, 0x7FC00000, 4), "no finite value"),
    ):
        with pytest.raises(DataLossError, match=message):
            decoder.decode(damaged, states[0], states[1])


def test_a_token_that_is_not_sent_is_refused() -> None:
    segment, decoder = encoded(20)
    tiers = segment.tiers.clone()
    tiers[3] = Tier.DROP
    states = torch.empty(2, 2, 20, 16)
    with pytest.raises(DataLossError, match="sends every token"):
        decoder.decode(KvSegment(0, 0, tiers, segment.body), states[0], states[1])


def test_one_basis_serves_both_codecs() -> None:
    fixed, spectral, shape = codecs.get("fixed_rate"), codecs.get("spectral"), geometry()
    basis = basis_of(shape)
    assert fixed.basis_digest(basis) == spectral.basis_digest(basis)
    assert fixed.basis_type is spectral.basis_type
    assert fixed.writes(policies.get("spectral"))
    assert not fixed.writes(policies.get("greedy"))


def test_important_tokens_are_finer() -> None:
    shape = geometry(kv_heads=1, head_dim=64, layers=1)
    basis = basis_of(shape)
    seen = capture(basis, 0, 256)
    # The last query looks at token 100 and at nothing else.
    loud = replace(seen, queries=seen.keys[:, 100:101].repeat(2, 8, 1) * 10, scaling=0.5)
    [segment] = encoder_of(basis, shape, 256, 0.2).encode(loud)
    received = torch.empty(2, 1, 256, 64)
    FixedRateDecoder(basis, shape).decode(segment, received[0], received[1])
    error = (received[1] - seen.values).square().mean(dim=(0, 2))
    assert error[100] < error[4:].median() / 8


def test_a_segment_of_sinks_only_has_nothing_else() -> None:
    shape = geometry(layers=1)
    basis = basis_of(shape)
    seen = capture(basis, 0, 1)
    encoder = FixedRateEncoder(CalibratedRequest(basis, shape, 1, 100 * shape.fp16_bytes(1), "attention", 0))
    [segment] = encoder.encode(seen)
    assert segment.body.numel() == HEADER.size + shape.fp16_bytes_per_layer(1)
    received = torch.empty(2, 2, 1, 16)
    taken = FixedRateDecoder(basis, shape).decode(segment, received[0], received[1])
    assert taken[Tier.FP16] == segment.body.numel()
    assert torch.equal(received[0], seen.keys.half().float())
    assert np.isclose(float(received[1].sum()), float(seen.values.half().float().sum()))
