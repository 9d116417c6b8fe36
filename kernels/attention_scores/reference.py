"""Attention that tokens receive, in plain torch.

This is what runs on a GPU, and what the CPU's loops must agree with. A kernel of its own would save a GPU the logits'
way to its memory and back; today no such kernel exists.
"""

import math

import torch

from spectrumkv.kernels.logits import causal_mask, soft_cap


def accumulated_attention(
    queries: torch.Tensor, keys: torch.Tensor, window: int, sliding_window: int | None, softcap: float | None
) -> torch.Tensor:
    """Sum softmax weights over queries; takes memory for g · w · n logits of every KV head.

    Args:
        queries: `[kv_heads, g · w, head_dim]`; see `dispatch.accumulated_attention`.
        keys: `[kv_heads, n, head_dim]`.
        window: w.
        sliding_window: how many of the newest tokens a query sees; None is all.
        softcap: bound of the logits; None is no bound.

    Returns:
        `[kv_heads, n]` in the queries' dtype.
    """
    tokens = keys.shape[1]
    logits = torch.matmul(queries, keys.to(queries.dtype).transpose(1, 2))
    if softcap is not None:
        soft_cap(logits, softcap, out=logits)
    seen = causal_mask(range(tokens - window, tokens), tokens, sliding_window, keys.device)
    # Every query sees at least itself, so no row is masked entirely.
    logits.view(-1, window, tokens).masked_fill_(~seen, -math.inf)
    return torch.softmax(logits, dim=-1).sum(dim=1)
