"""The spectral transform, quantized, against plain torch in float64."""

import numpy as np
import pytest
import torch

from spectrumkv.common.kv.codecs.spectral.coefficients import CoefficientModel, Quantization
from spectrumkv.common.kv.codecs.spectral.layout import TokenClasses
from spectrumkv.common.kv.codecs.spectral.transform import LayerTransform
from spectrumkv.kernels.spectral.transform import TOKENS
from tests.common.kv.codecs.spectral_prompts import basis_of, geometry, plain_coefficients, plain_states


@pytest.mark.parametrize(("kv_heads", "head_dim"), [(1, 6), (3, 64), (2, 80)])
@pytest.mark.parametrize("tokens", [1, 17, TOKENS, TOKENS + 1, 2 * TOKENS + 19])
@pytest.mark.parametrize("deviates", [False, True])
def test_symbols_are_rounded_coefficients_and_come_back(
    kv_heads: int, head_dim: int, tokens: int, deviates: bool
) -> None:
    shape = geometry(kv_heads, head_dim, layers=1)
    basis, first = basis_of(shape), 700
    transform = LayerTransform(basis, 0)
    generator = torch.Generator().manual_seed(tokens)
    coefficients = torch.randn(2, kv_heads, tokens, head_dim, generator=generator) * basis.std[0][:, :, None]
    # As models leave them: token by token.
    keys, values = plain_states(basis, 0, coefficients, first).float().transpose(1, 2).contiguous().transpose(1, 2)
    classes = TokenClasses(np.random.default_rng(tokens).integers(-12, 4, tokens), sinks=0)
    deviating = np.random.default_rng(1).normal(0, 1, transform.calibrated.mean.shape).astype(np.float32)
    model = CoefficientModel(transform.calibrated.classes, deviating) if deviates else transform.calibrated
    quantization = Quantization(-1.0, classes, model)
    symbols, largest = transform.quantize(keys, values, first, quantization)
    states = plain_coefficients(basis, 0, keys, values, first)
    wanted = states - torch.from_numpy(model.mean).view(2, kv_heads, 1, head_dim)
    assert largest == pytest.approx(float(wanted.abs().max()), rel=1e-5)
    step = torch.from_numpy(np.exp2(-1.0 + classes.classes / 2))[:, None]
    rounded = (wanted / step).round().flatten().numpy()
    # The trellis leaves the nearest integer for the next one, and in float32 some are rounded to the other side.
    assert np.abs(np.sort(symbols) - np.sort(rounded)).max() <= 1

    slots = torch.full((2, kv_heads, 2 * tokens, head_dim), torch.nan)[:, :, tokens:]
    transform.dequantize(symbols, first, quantization, slots[0], slots[1])
    error = plain_coefficients(basis, 0, slots[0], slots[1], first) - states
    assert bool((error.abs() <= step * 1.01 + 1e-3 * wanted.abs() + 1e-2).all())
