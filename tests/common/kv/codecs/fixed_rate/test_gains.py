from dataclasses import replace

import numpy as np
import pytest
import torch

from spectrumkv.common.kv.codecs.calibrated.basis import CalibratedBasis
from spectrumkv.common.kv.codecs.calibrated.request import CalibratedRequest
from spectrumkv.common.kv.codecs.fixed_rate import encoder
from spectrumkv.common.kv.codecs.fixed_rate.codec import FixedRateDecoder
from spectrumkv.common.kv.codecs.fixed_rate.encoder import FixedRateEncoder
from spectrumkv.common.kv.codecs.fixed_rate.gains import LEVEL, gain_level, gain_scales
from spectrumkv.common.kv.codecs.fixed_rate.transform import LayerTransform
from spectrumkv.kernels.fixed_rate.layout import GROUP_ROWS, RecordLayout, token_bytes
from tests.common.kv.codecs.spectral_prompts import basis_of, capture, geometry, plain_coefficients, plain_states

SHAPE = geometry(kv_heads=4, head_dim=32, layers=3)
ROWS = 2 * 4 * 32
# A mean token has class 0 and gain 0.
MEAN = token_bytes(np.zeros(1, np.int64), np.zeros(1, np.int64))


def test_every_row_counts_at_budgets_that_have_bits_for_all() -> None:
    basis = basis_of(SHAPE)
    level = gain_level(LayerTransform.of_layers(basis), 2 * ROWS)
    torch.testing.assert_close(gain_scales(basis, level), 1 / basis.std.flatten(1))


@pytest.mark.parametrize("bits", [0, 0.2, 0.8, 1.6, 4.8])
def test_rows_without_bits_do_not_count(bits: float) -> None:
    basis = basis_of(SHAPE)
    transforms = LayerTransform.of_layers(basis)
    level = gain_level(transforms, bits * ROWS / 8)
    for transform, scale in zip(transforms, gain_scales(basis, level), strict=True):
        order = transform.calibrated.order
        layout = RecordLayout.of(transform.calibrated, MEAN, LEVEL * level, 1)
        wide = np.repeat(layout.widths[layout.profiles[0]] > 0, GROUP_ROWS)
        wide[:GROUP_ROWS] = True
        assert ((scale.numpy()[order] > 0) == wide).all()
        counted = (scale * transform.basis.std[transform.layer].flatten()).square()
        assert float(counted.sum()) == pytest.approx(ROWS, rel=1e-5)


def test_a_level_takes_the_words_that_there_are() -> None:
    basis = basis_of(SHAPE)
    transforms = LayerTransform.of_layers(basis)
    for bytes_of_token in (20.0, 60.0, 150.0):
        level = gain_level(transforms, bytes_of_token)
        words = {
            step: sum(RecordLayout.of(one.calibrated, MEAN, LEVEL * (level + step), 1).words for one in transforms)
            for step in (-1, 1)
        }
        assert words[1] <= bytes_of_token * SHAPE.layers / 4 <= words[-1]


def weighted_error(basis: CalibratedBasis, budget: float) -> float:
    """Squared error of the coefficients of a prompt in which rows without bits vary from token to token."""
    shape, tokens = geometry(kv_heads=4, head_dim=32, layers=1), 400
    seen = capture(basis, 0, tokens)
    coefficients = plain_coefficients(basis, 0, seen.keys, seen.values, 0)
    sizes = torch.randn(tokens, generator=torch.Generator().manual_seed(3)).exp().double()
    small = basis.std[0] < basis.std[0].median()
    coefficients *= torch.where(small[:, :, None], sizes[:, None], 1.0)
    keys, values = plain_states(basis, 0, coefficients, 0).float()
    request = CalibratedRequest(basis, shape, tokens, int(budget * shape.fp16_bytes(tokens)), "position", 0)
    received = torch.empty(2, 4, tokens, 32)
    for segment in FixedRateEncoder(request).encode(replace(seen, keys=keys, values=values)):
        FixedRateDecoder(basis, shape).decode(segment, received[0], received[1])
    assert not received.isnan().any()
    found = plain_coefficients(basis, 0, *received, 0)
    return float((found - plain_coefficients(basis, 0, keys, values, 0)).square().sum())


def test_what_rows_without_bits_do_costs_the_others_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    basis = basis_of(geometry(kv_heads=4, head_dim=32, layers=1))
    own = weighted_error(basis, 0.05)
    monkeypatch.setattr(encoder, "gain_scales", lambda basis, level: 1 / basis.std.flatten(1))
    assert own < 0.8 * weighted_error(basis, 0.05)
