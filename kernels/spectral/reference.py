"""The spectral transform in plain torch, float64: what the compiled loops must agree with.

Keys and values of one layer become coefficients in the layer's basis. Quantization is not here: the compiled loops
round what these functions return, divided by a token's step, in float32.
"""

import torch


def turn(states: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Turn elements j and j + d/2 of every token by an angle (rotary embedding, RoFormer, arXiv 2104.09864).

    Args:
        states: float64 `[kv_heads, n, d]`.
        angles: float64 `[n, d / 2]`; negative ones turn back.

    Returns:
        float64 `[kv_heads, n, d]`.
    """
    low, high = states.chunk(2, dim=-1)
    turned = torch.complex(low, high) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)


def analyse(
    keys: torch.Tensor,
    values: torch.Tensor,
    angles: torch.Tensor,
    scaling: float,
    mean: torch.Tensor,
    analysis: torch.Tensor,
) -> torch.Tensor:
    """Transform keys and values to coefficients.

    Args:
        keys: `[kv_heads, n, d]`, after the rotary embedding.
        values: like `keys`.
        angles: float64 `[n, d / 2]`, those that the keys were turned by.
        scaling: factor that the rotary embedding has beside the angle.
        mean: `[2, kv_heads, d]`, keys' heads first.
        analysis: `[2, kv_heads, d, d]`, a column for each coefficient.

    Returns:
        float64 `[2, kv_heads, n, d]`.
    """
    states = torch.stack([turn(keys.double(), -angles) / scaling, values.double()])
    return (states - mean.double()[:, :, None]) @ analysis.double()


def synthesise(
    coefficients: torch.Tensor, angles: torch.Tensor, scaling: float, mean: torch.Tensor, analysis: torch.Tensor
) -> torch.Tensor:
    """Transform coefficients back to keys and values.

    Args:
        coefficients: `[2, kv_heads, n, d]`.
        angles: see `analyse`.
        scaling: see `analyse`.
        mean: see `analyse`.
        analysis: see `analyse`; it is inverted here.

    Returns:
        Keys, after the rotary embedding, and values: float64 `[2, kv_heads, n, d]`.
    """
    # One matrix at a time: torch's MKL fails at batches of large ones once a number of threads was set.
    synthesis = torch.stack([torch.stack([one.inverse() for one in side]) for side in analysis.double()])
    states = coefficients.double() @ synthesis + mean.double()[:, :, None]
    return torch.stack([turn(states[0], angles) * scaling, states[1]])
