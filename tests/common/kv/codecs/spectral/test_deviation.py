"""What a segment says of its own coefficients: when, in how many bytes, and what it is worth."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from spectrumkv.common.errors import DataLossError
from spectrumkv.common.kv.codecs.spectral.codec import SpectralDecoder
from spectrumkv.common.kv.codecs.spectral.coefficients import (
    FEWEST_TOKENS,
    MEAN_PARTS,
    MOST_CLASSES,
    ZERO,
    CoefficientModel,
    Deviation,
)
from spectrumkv.common.kv.codecs.spectral.layout import TokenClasses
from spectrumkv.common.kv.codecs.spectral.segment_codec import HEADER, UncodedSegment, decode_segment, encode_segment
from spectrumkv.common.kv.codecs.spectral.symbols import compress
from spectrumkv.common.kv.codecs.spectral.transform import SAMPLE, LayerTransform
from tests.common.kv.codecs.spectral_prompts import basis_of, capture, encoder_of, geometry, plain_coefficients

SHAPE = geometry(kv_heads=2, head_dim=64, layers=2)


def segment_of(tokens: int, seed: int = 0, shift: float = 0.7, octaves: float = 1.5) -> UncodedSegment:
    """A segment of a prompt whose means and standard deviations are others than its basis says."""
    told = basis_of(SHAPE)
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(told.std.shape, generator=generator) * told.std * shift
    factors = torch.exp2(torch.randn(told.std.shape, generator=generator) * octaves)
    real = replace(
        told,
        mean=told.mean + (means[..., None, :] @ told.synthesis)[..., 0, :],
        std=told.std * factors,
    )
    seen = capture(real, 0, tokens)
    classes = TokenClasses(np.zeros(tokens, np.int64), sinks=2)
    return UncodedSegment(LayerTransform(told, 0), 0, seen.keys, seen.values, classes)


def test_a_deviation_is_the_means_and_standard_deviations_of_the_tokens() -> None:
    segment = segment_of(tokens=2 + SAMPLE)
    wanted = plain_coefficients(segment.transform.basis, 0, segment.keys, segment.values, 0)[:, :, 2:]
    std = wanted.std(dim=2, correction=0).flatten().numpy()
    assert segment.deviation is not None
    model = segment.deviation.of(segment.transform.calibrated)
    assert np.abs(model.classes / 2 - np.log2(std)).max() <= 0.25 + 1e-3
    mean = wanted.mean(dim=2).flatten().numpy()
    part = np.exp2(model.classes / 2) / MEAN_PARTS
    # Means within one and a half standard errors of 0 are taken for it.
    assert (np.abs(model.mean - mean) <= part * 1.1).all()


def test_long_segments_are_measured_by_a_sample() -> None:
    short, long = segment_of(tokens=2 + SAMPLE), segment_of(tokens=2_000)
    assert short.deviation is not None
    assert long.deviation is not None
    assert np.abs(short.deviation.classes - long.deviation.classes).mean() < 0.5
    assert np.abs(short.deviation.means - long.deviation.means).mean() < MEAN_PARTS / 4


@pytest.mark.parametrize(("tokens", "sends"), [(FEWEST_TOKENS, False), (700, True)])
def test_a_deviation_is_sent_where_it_pays(tokens: int, sends: bool) -> None:
    segment = segment_of(tokens)
    body, quantization = encode_segment(segment, -1.0, SHAPE)
    assert (HEADER.unpack_from(body)[3] > 0) == sends
    assert (quantization.model is not segment.transform.calibrated) == sends
    plain = replace(segment)
    plain.__dict__["deviation"] = None
    without, _ = encode_segment(plain, -1.0, SHAPE)
    assert HEADER.unpack_from(without)[3] == 0
    assert len(body) <= len(without) * (0.9 if sends else 1.0)

    received = torch.full((2, *segment.keys.shape), torch.nan)
    found = decode_segment(segment.transform, memoryview(body), 0, SHAPE, received[0], received[1])
    assert (found.model.classes == quantization.model.classes).all()
    assert (found.model.mean == quantization.model.mean).all()
    error = plain_coefficients(segment.transform.basis, 0, received[0] - segment.keys, received[1], 0)
    assert error.isfinite().all()


def test_a_calibrated_prompt_sends_no_deviation() -> None:
    body, _ = encode_segment(segment_of(2_000, shift=0.0, octaves=0.0), -1.0, SHAPE)
    assert HEADER.unpack_from(body)[3] == 0


@pytest.mark.parametrize("budget", [0.1, 0.4])
def test_a_budget_is_met_where_means_and_standard_deviations_are_others(budget: float) -> None:
    told, tokens = basis_of(SHAPE), 600
    real = replace(told, mean=told.mean + 0.5, std=told.std * torch.linspace(0.3, 3, SHAPE.head_dim))
    encoder, decoder, sent = encoder_of(told, SHAPE, tokens, budget), SpectralDecoder(told, SHAPE), 0
    for layer in range(SHAPE.layers):
        for segment in encoder.encode(capture(real, layer, tokens)):
            sent += segment.wire_bytes
            received = torch.full((2, SHAPE.kv_heads, segment.tiers.numel(), SHAPE.head_dim), torch.nan)
            assert decoder.decode(segment, received[0], received[1]) == segment.tier_bytes
            assert received.isfinite().all()
    assert 0.98 * budget <= sent / SHAPE.fp16_bytes(tokens) <= budget


def test_a_deviation_survives_its_bytes() -> None:
    generator = np.random.default_rng(0)
    deviation = Deviation(generator.integers(-MOST_CLASSES, MOST_CLASSES + 1, 96), generator.integers(-127, 128, 96))
    back = Deviation.decoded(memoryview(deviation.coded), 96)
    assert (back.classes == deviation.classes).all()
    assert (back.means == deviation.means).all()
    with pytest.raises(DataLossError, match="hold"):
        Deviation.decoded(memoryview(deviation.coded), 95)
    levels = np.full(2 * 96, ZERO, np.uint8)
    levels[7] = ZERO + MOST_CLASSES + 1
    with pytest.raises(DataLossError, match=f"deviates by {MOST_CLASSES + 1}"):
        Deviation.decoded(memoryview(compress(levels)), 96)


@pytest.mark.parametrize("odd", [np.inf, np.nan])
def test_nothing_is_measured_of_states_that_are_not_finite(odd: float) -> None:
    segment = segment_of(100)
    segment.values[1, 50, 3] = odd
    assert segment.deviation is None


def test_extremes_are_clipped() -> None:
    model = CoefficientModel.calibrated(np.ones(4, np.float32))
    sums, squares = np.array([0.0, 1e38, 1e30, -1e30]), np.array([0.0, 1e76, 1e60, 1e70])
    deviation = Deviation.measured(model, sums, squares, tokens=1)
    assert np.abs(deviation.classes).max() == MOST_CLASSES
    assert np.abs(deviation.means).max() <= 127
    assert np.isfinite(deviation.of(model).mean).all()
