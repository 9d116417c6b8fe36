"""The spectral bit allocation in whole tiers."""

import pytest
import torch

from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.kv.codecs.base import codecs
from spectrumkv.common.kv.codecs.calibrated.basis import CalibratedBasis
from spectrumkv.common.kv.codecs.calibrated.request import CalibratedRequest
from spectrumkv.common.kv.codecs.segmentation import token_bytes
from spectrumkv.common.kv.codecs.spectral.tier_allocation import SpectralTiers
from spectrumkv.common.kv.codecs.tiered import TieredEncoder, tier_codecs
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.tiers import Tier, count_tiers
from tests.common.kv.codecs.spectral_prompts import basis_of, capture, geometry

ABSMAX = tier_codecs()["absmax"]


def encoder_of(basis: CalibratedBasis, shape: KvGeometry, tokens: int, segment_bytes: int) -> TieredEncoder:
    taken = {tier: token_bytes(ABSMAX, tier, shape) for tier in ABSMAX.tiers}
    return TieredEncoder(
        ABSMAX, shape, SpectralTiers(CalibratedRequest(basis, shape, tokens, segment_bytes, "attention", 0), taken)
    )


@pytest.mark.parametrize("tokens", [300, 1500])
@pytest.mark.parametrize("budget", [0.28, 0.3, 0.45, 0.8, 1.0])
def test_a_budget_is_met_and_never_exceeded(tokens: int, budget: float) -> None:
    shape = geometry(kv_heads=2, head_dim=64, layers=4)
    basis = basis_of(shape)
    encoder = encoder_of(basis, shape, tokens, int(budget * shape.fp16_bytes(tokens)))
    decoder = codecs.get("absmax").decoder(shape, None)
    sent = 0
    for layer in range(shape.layers):
        seen = capture(basis, layer, tokens)
        for segment in encoder.encode(seen):
            sent += segment.wire_bytes
            received = torch.full((2, shape.kv_heads, segment.tiers.numel(), shape.head_dim), torch.nan)
            assert decoder.decode(segment, received[0], received[1]) == segment.tier_bytes
            assert received.isfinite().all()
    share = sent / shape.fp16_bytes(tokens)
    assert 0.99 * budget <= share <= budget


def test_less_than_int4_everywhere_is_exceeded_by_that_and_no_more() -> None:
    shape = geometry(kv_heads=2, head_dim=64)
    basis = basis_of(shape)
    encoder = encoder_of(basis, shape, 100, 1000)
    [segment] = encoder.encode(capture(basis, 0, 100))
    assert count_tiers(segment.tiers)[Tier.INT4] == 100
    assert segment.body.numel() / shape.fp16_bytes_per_layer(100) == pytest.approx(ABSMAX.least_byte_budget(shape))


def test_tiers_follow_the_attention_that_tokens_get() -> None:
    shape = geometry(kv_heads=1, head_dim=64, layers=1)
    basis = basis_of(shape)
    seen = capture(basis, 0, 256)
    # The last query looks at token 100 and at nothing else.
    loud = LayerCapture(seen.keys[:, 100:101].repeat(2, 8, 1) * 10, seen.keys, seen.values, 0.5, None, None, 0)
    encoder = encoder_of(basis, shape, 256, int(0.35 * shape.fp16_bytes(256)))
    [segment] = encoder.encode(loud)
    assert segment.tiers[100] == segment.tiers.max()
    assert segment.tiers[4:].float().mean() < float(segment.tiers[100])


def test_layers_that_need_finer_steps_get_wider_tiers() -> None:
    shape = geometry(kv_heads=2, head_dim=64, layers=2)
    basis = basis_of(shape)
    basis.std[1] *= 2.0**4
    encoder = encoder_of(basis, shape, 200, int(0.5 * shape.fp16_bytes(200)))
    first, second = (
        next(segment.tiers for segment in encoder.encode(capture(basis, layer, 200))) for layer in range(2)
    )
    assert second.float().mean() > first.float().mean()
