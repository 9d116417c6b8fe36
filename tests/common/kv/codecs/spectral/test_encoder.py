import pytest
import torch

from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.kv.codecs.spectral.codec import SpectralDecoder
from tests.common.kv.codecs.spectral_prompts import basis_of, capture, encoder_of, geometry


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
