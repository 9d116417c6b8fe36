"""States as models and slots leave them, `[heads, n, d]` with any strides, for loops that see memory only."""

import torch


def adjacent(states: torch.Tensor) -> torch.Tensor:
    """The states with the elements of a head side by side, as models leave them."""
    return states if states.stride(2) == 1 else states.contiguous()


def flat(states: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """All memory that `states` spans, as one row, and how many elements it is from head to head and token to token.

    Args:
        states: the elements of a head side by side, see `adjacent`.
    """
    heads, tokens, head_dim = states.shape
    head_stride, token_stride, _ = states.stride()
    span = (heads - 1) * head_stride + (tokens - 1) * token_stride + head_dim
    return states.as_strided((span,), (1,)), head_stride, token_stride
