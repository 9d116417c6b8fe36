"""The rotary embedding, done and undone: keys are coded as they were before it."""

from functools import lru_cache

import torch


@lru_cache(maxsize=8)
def angles(frequencies: tuple[float, ...], first: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of the angles at positions `first` and up, float32 `[tokens, head_dim / 2]`.

    All layers of a prompt ask for the same ones.

    Args:
        frequencies: radians per position, `[head_dim / 2]`.
        first: the first position.
        tokens: how many positions.
    """
    positions = torch.arange(first, first + tokens, dtype=torch.float64)
    turned = positions[:, None] * torch.tensor(frequencies, dtype=torch.float64)
    return turned.cos().float(), turned.sin().float()


def rotate(states: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotate elements j and j + d/2 of `[heads, n, d]` by the angle of their position; with −sine, back."""
    low, high = states.chunk(2, dim=-1)
    return torch.cat([low * cosine - high * sine, high * cosine + low * sine], dim=-1)
