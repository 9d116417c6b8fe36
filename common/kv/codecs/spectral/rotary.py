"""The rotary embedding, done and undone: keys are coded as they were before it."""

from functools import lru_cache

import torch

# A table has a power of two of positions, and no fewer.
LEAST_POSITIONS = 256


def angles(frequencies: tuple[float, ...], first: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of the angles at positions `first` and up, float32 `[tokens, head_dim / 2]`.

    Args:
        frequencies: radians per position, `[head_dim / 2]`.
        first: the first position.
        tokens: how many positions.
    """
    end = first + tokens
    cosine, sine = _table(frequencies, max(LEAST_POSITIONS, 1 << (end - 1).bit_length()))
    return cosine[first:end], sine[first:end]


@lru_cache(maxsize=16)
def _table(frequencies: tuple[float, ...], positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of positions from 0 on: all layers and segments of all prompts look up the same ones."""
    turned = torch.arange(positions, dtype=torch.float64)[:, None] * torch.tensor(frequencies, dtype=torch.float64)
    return turned.cos().float(), turned.sin().float()


def rotate(states: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotate elements j and j + d/2 of `[heads, n, d]` by the angle of their position; with −sine, back."""
    low, high = states.chunk(2, dim=-1)
    return torch.cat([low * cosine - high * sine, high * cosine + low * sine], dim=-1)
