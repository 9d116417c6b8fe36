"""States as models and slots leave them, `[heads, n, d]` with any strides, for loops that see memory only."""

from typing import Any

import torch

# How numba is shown what it has no type for; see `absmax_rows`.
_STAND_INS = {torch.float16: torch.uint16, torch.bfloat16: torch.int16, torch.int8: torch.uint8}


def array(tensor: torch.Tensor) -> Any:
    """The tensor's memory as numpy shows it, in a type that numba knows."""
    stand_in = _STAND_INS.get(tensor.dtype)
    return (tensor if stand_in is None else tensor.view(stand_in)).numpy()


def adjacent(states: torch.Tensor) -> torch.Tensor:
    """The states with the elements of a head side by side, as models leave them."""
    return states if states.stride(2) == 1 else states.contiguous()


def flat(states: torch.Tensor) -> tuple[Any, int, int]:
    """All memory that `states` spans, as one row, and how many elements it is from head to head and token to token.

    Args:
        states: on the CPU, the elements of a head side by side, see `adjacent`.
    """
    heads, tokens, head_dim = states.shape
    head_stride, token_stride, _ = states.stride()
    span = (heads - 1) * head_stride + (tokens - 1) * token_stride + head_dim
    return array(states.as_strided((span,), (1,))), head_stride, token_stride
