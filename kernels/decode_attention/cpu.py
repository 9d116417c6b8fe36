"""Attention of one decode step over the slots of several requests, on CPUs: one compiled call for a layer.

It takes one thread, and reads keys and values at what one thread gets from memory.
"""

import numpy as np
import torch

from spectrumkv.kernels.attention_scores.cpu_loops import attend
from spectrumkv.kernels.jit.gemm import COLUMNS


def decode_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    firsts: torch.Tensor,
    ends: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Attend over a run of slots for each row of a batch.

    Args:
        queries: float32 `[batch, query_heads, head_dim]`, any strides; head h reads KV head
            h // (query_heads / kv_heads). `attends` says which head_dim there may be.
        keys: float32 `[kv_heads, slots, head_dim]`, contiguous; those of all requests.
        values: like `keys`.
        firsts: int64 `[batch]`, the first slot of each row.
        ends: int64 `[batch]`, one past its last; every row has at least one slot.
        scaling: factor of query · key before the softmax.

    Returns:
        float32 `[batch, query_heads, head_dim]`.
    """
    grouped = queries.reshape(queries.shape[0], keys.shape[0], -1, queries.shape[2])
    attended = torch.empty_like(grouped, memory_format=torch.contiguous_format)
    attend(
        grouped.contiguous().numpy(),
        keys.numpy(),
        values.numpy(),
        firsts.numpy(),
        ends.numpy(),
        np.float32(scaling),
        attended.numpy(),
    )
    return attended.view(queries.shape)


def attends(head_dim: int) -> bool:
    """Whether heads have whole vectors, as nearly all models' have."""
    return head_dim % COLUMNS == 0


def prepare() -> None:
    """Compile, or load what an earlier process compiled."""
    one, zero = torch.ones(1, 1, COLUMNS), torch.zeros(1, dtype=torch.int64)
    decode_attention(one, one, one, zero, zero + 1, 1.0)
