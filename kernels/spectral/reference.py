"""The spectral transform and the trellis in plain torch, float64: what the compiled loops must agree with.

Keys and values of one layer become coefficients in the layer's basis. Plain rounding is not here: the compiled loops
round what `analyse` returns, divided by a token's step, in float32.
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


def trellis_values(integers: torch.Tensor, in_trellis: torch.Tensor) -> torch.Tensor:
    """Return the values, in steps, that the integers of one head stand for; kv.proto says how.

    Args:
        integers: int64 `[rows, n]`.
        in_trellis: bool `[rows, n]`; the others stand for themselves.

    Returns:
        float64 `[rows, n]`.
    """
    values = integers.double()
    a, b = torch.zeros(2, integers.shape[1], dtype=torch.int64)
    for row, coded in enumerate(in_trellis):
        values[row, coded] += (a / 2 - 1 / 4)[coded]
        a, b = torch.where(coded, b ^ (integers[row] & 1), a), torch.where(coded, a, b)
    return values


def least_trellis_error(coefficients: torch.Tensor, in_trellis: torch.Tensor) -> torch.Tensor:
    """Return the least squared error that a path through the trellis can have, by trying both ways from every state.

    Args:
        coefficients: float64 `[rows, n]`, in steps, of one head.
        in_trellis: bool `[rows, n]`; the others are not counted.

    Returns:
        float64 `[n]`.
    """
    costs = torch.full((2, 2, coefficients.shape[1]), torch.inf, dtype=torch.float64)
    costs[0, 0] = 0
    for row, coded in zip(coefficients, in_trellis, strict=True):
        following = torch.full_like(costs, torch.inf)
        for a in range(2):
            for b in range(2):
                for odd in range(2):
                    wanted = row - (a / 2 - 1 / 4)
                    error = wanted - (2 * ((wanted - odd) / 2).round() + odd)
                    following[b ^ odd, a] = torch.minimum(following[b ^ odd, a], costs[a, b] + error.square())
        costs = torch.where(coded, following, costs)
    return costs.amin(dim=(0, 1))
