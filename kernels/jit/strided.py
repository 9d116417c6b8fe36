"""Tensors as memory: keys and values with any strides, for compiled loops, which take numpy arrays.

Models leave states `[heads, n, d]` token by token, pools leave them head by head. Loops are compiled once for each
type of array, so they take all memory that the states span as one row, and the two strides as numbers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from spectrumkv.kernels.jit.gemm import padded

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
    """Return states with the elements of a head side by side, as models leave them.

    Args:
        states: `[heads, n, d]`, any dtype and strides.

    Returns:
        The states themselves, or a copy where their elements lie otherwise.
    """
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


@contextmanager
def written_rows(states: torch.Tensor) -> Iterator[torch.Tensor]:
    """Lend memory that compiled loops can write to.

    Args:
        states: of any float dtype, strides and device; written.

    Yields:
        The states themselves if loops can write to them, else a float32 copy, which is copied back at the end.
    """
    if states.dtype == torch.float32 and states.device.type == "cpu" and states.stride(-1) == 1:
        yield states
        return
    rows = torch.empty(states.shape)
    yield rows
    if states.dtype == torch.float16:
        # What was near its greatest number must not come back infinite.
        largest = torch.finfo(torch.float16).max
        rows.clamp_(-largest, largest)
    states.copy_(rows)


def padded_matrices(matrices: torch.Tensor) -> np.ndarray:
    """Give matrices as many columns as compiled loops want.

    Args:
        matrices: float32 `[2, kv_heads, d, d]` on the CPU.

    Returns:
        float32 `[2 · kv_heads, d, padded]`, the columns beyond d zeros.
    """
    columns = matrices.shape[-1]
    wide = matrices.flatten(0, 1)
    if padded(columns) > columns:
        wide = torch.nn.functional.pad(wide, (0, padded(columns) - columns))
    memory: np.ndarray = wide.contiguous().numpy()
    return memory
