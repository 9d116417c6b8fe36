"""Each codec says what each token takes of a body, and that adds up to the body."""

import numpy as np
import pytest
import torch

from spectrumkv.common.kv.codecs.base import codecs
from spectrumkv.common.kv.codecs.calibrated.request import CalibratedRequest
from spectrumkv.common.kv.codecs.fixed_rate.encoder import FixedRateEncoder
from spectrumkv.common.kv.codecs.spectral.encoder import SpectralEncoder
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.segment import KvSegment
from spectrumkv.common.kv.tiers import Tier
from tests.common.kv.codecs.spectral_prompts import basis_of, capture, geometry

SHAPE = geometry()
ENCODERS = {"spectral": SpectralEncoder, "fixed_rate": FixedRateEncoder}


def tiered(codec: str, tiers: list[Tier], shape: KvGeometry = SHAPE) -> KvSegment:
    """A segment of tokens at these tiers."""
    of_tokens = torch.tensor(tiers, dtype=torch.uint8)
    keys, values = torch.randn(2, shape.kv_heads, len(tiers), shape.head_dim)
    coded = codecs.get(codec).encode(keys, values, of_tokens, shape)
    return KvSegment(0, 0, of_tokens, coded.body, coded.tier_bytes)


def test_a_token_of_absmax_takes_its_codes_and_scales() -> None:
    order = [Tier.INT4, Tier.FP16, Tier.DROP, Tier.INT8, Tier.INT4]
    segment = tiered("absmax", order)
    taken = codecs.get("absmax").bytes_of_tokens(segment, SHAPE, None)
    elements, scales = SHAPE.elements_per_token_layer, 2 * 2 * SHAPE.kv_heads
    widths = {
        Tier.DROP: 0,
        Tier.INT4: elements / 2 + scales,
        Tier.INT8: elements + scales,
        Tier.FP16: 2 * elements,
    }
    assert taken.tolist() == [widths[tier] for tier in order]
    assert taken.sum() == segment.body.numel()


def test_a_token_of_native_takes_the_models_own_dtype() -> None:
    taken = codecs.get("native").bytes_of_tokens(tiered("native", [Tier.NATIVE] * 3), SHAPE, None)
    assert taken.tolist() == [SHAPE.native_bytes_per_token_layer] * 3


@pytest.mark.parametrize("budget", [0.15, 0.3, 0.9])
@pytest.mark.parametrize("tokens", [1, 2, 40, 700])
@pytest.mark.parametrize("name", ENCODERS)
def test_tokens_of_a_calibrated_codec_take_the_whole_body(name: str, tokens: int, budget: float) -> None:
    basis = basis_of(SHAPE)
    request = CalibratedRequest(basis, SHAPE, tokens, int(budget * SHAPE.fp16_bytes(tokens)), "attention", 0)
    encoder = ENCODERS[name](request)
    for layer in range(SHAPE.layers):
        for segment in encoder.encode(capture(basis, layer, tokens)):
            taken = codecs.get(name).bytes_of_tokens(segment, SHAPE, basis)
            assert taken.shape == segment.tiers.shape
            assert taken.min() > 0
            assert taken.sum() == pytest.approx(segment.body.numel())


@pytest.mark.parametrize("name", ENCODERS)
def test_a_token_that_more_attention_goes_to_takes_more(name: str) -> None:
    tokens, basis = 400, basis_of(SHAPE)
    request = CalibratedRequest(basis, SHAPE, tokens, int(0.3 * SHAPE.fp16_bytes(tokens)), "position", 0)
    (segment,) = ENCODERS[name](request).encode(capture(basis, 0, tokens))
    taken = codecs.get(name).bytes_of_tokens(segment, SHAPE, basis)
    # The first tokens are sent whole.
    assert taken[0] == pytest.approx(SHAPE.fp16_bytes_per_layer(1))
    # Scorer "position" ranks late tokens highest; what they take must follow.
    thirds = [part.mean() for part in np.array_split(taken[4:], 3)]
    assert thirds[0] < thirds[1] < thirds[2]


def test_escapes_belong_to_their_token() -> None:
    tokens, basis = 60, basis_of(SHAPE)
    request = CalibratedRequest(basis, SHAPE, tokens, int(0.3 * SHAPE.fp16_bytes(tokens)), "attention", 0)
    layer = capture(basis, 0, tokens)
    layer.values[:, 30] *= 1e6
    (segment,) = FixedRateEncoder(request).encode(layer)
    taken = codecs.get("fixed_rate").bytes_of_tokens(segment, SHAPE, basis)
    assert taken.argmax() == 30
    assert taken.sum() == pytest.approx(segment.body.numel())
