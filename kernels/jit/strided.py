"""Tensors as memory: keys and values with any strides, for compiled loops, which take numpy arrays.

Models leave states `[heads, n, d]` token by token, pools leave them head by head. Loops are compiled once for each
type of array, so they take all memory that the states span as one row, and the two strides as numbers.
"""

from typing import Any

import torch

# numba has no type for these; the loops know what stands for what (see `llvm.to_float32`).
_NUMBA_DTYPES = {torch.float16: torch.uint16, torch.bfloat16: torch.int16, torch.int8: torch.uint8}


def array(tensor: torch.Tensor) -> Any:
    """Show a tensor's memory as a numpy array of a type that numba knows.

    Args:
        tensor: on the CPU; of float32, float16, bfloat16, int8 or any type that numpy has, too.

    Returns:
        An array of the same shape and memory; uint16 stands for float16, int16 for bfloat16, uint8 for int8.
    """
    known = _NUMBA_DTYPES.get(tensor.dtype)
    return (tensor if known is None else tensor.view(known)).numpy()


def adjacent(states: torch.Tensor) -> torch.Tensor:
    """Return states with the elements of a head side by side, as models leave them; a copy where they are not."""
    return states if states.stride(2) == 1 else states.contiguous()


def flat(states: torch.Tensor) -> tuple[Any, int, int]:
    """Show all memory that states span as one row.

    Args:
        states: `[heads, n, d]` on the CPU, the elements of a head side by side; see `adjacent`.

    Returns:
        The memory as `array` shows it, the elements from head to head, and those from token to token.
    """
    heads, tokens, head_dim = states.shape
    head_stride, token_stride, _ = states.stride()
    span = (heads - 1) * head_stride + (tokens - 1) * token_stride + head_dim
    return array(states.as_strided((span,), (1,))), head_stride, token_stride
