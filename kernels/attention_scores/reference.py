"""Attention that tokens receive, in plain torch: what the CPU's loops and the kernels of Triton must agree with."""

import math

import torch

from spectrumkv.kernels.logits import causal_mask, soft_cap


def mean_attention(
    queries: torch.Tensor, keys: torch.Tensor, scaling: float, sliding_window: int | None, softcap: float | None
) -> torch.Tensor:
    """Average softmax weights; takes memory for the logits of all query heads. See `dispatch.mean_attention`.

    Returns:
        float32 `[n]`.
    """
    window = queries.shape[1]
    received = accumulated_attention(scaled(queries, keys, scaling), keys, window, sliding_window, softcap)
    return mean_of_seeing(received, queries.shape, sliding_window)


def accumulated_attention(
    queries: torch.Tensor, keys: torch.Tensor, window: int, sliding_window: int | None, softcap: float | None
) -> torch.Tensor:
    """Sum softmax weights over queries.

    Args:
        queries: `[kv_heads, g · w, head_dim]`, already multiplied by the attention's scaling: for each of the g query
            heads of a KV head those of the last w positions, in order.
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


def scaled(queries: torch.Tensor, keys: torch.Tensor, scaling: float) -> torch.Tensor:
    """Put all queries of one KV head in one matrix, which makes grouped-query attention without repeating the keys.

    Args:
        queries: `[query_heads, w, head_dim]`.
        keys: `[kv_heads, n, head_dim]`.
        scaling: factor of query · key.

    Returns:
        float32 `[kv_heads, g · w, head_dim]`, multiplied by `scaling`.
    """
    return queries.float().mul(scaling).reshape(keys.shape[0], -1, keys.shape[2])


def mean_of_seeing(received: torch.Tensor, queries: torch.Size, sliding_window: int | None) -> torch.Tensor:
    """Average over all query heads, and for each token over the queries that see it.

    Args:
        received: `[kv_heads, n]`, sums over queries.
        queries: shape of the queries, `[query_heads, w, head_dim]`.
        sliding_window: how many of the newest tokens a query sees; None is all.

    Returns:
        `[n]` in the dtype of `received`.
    """
    kv_heads, tokens = received.shape
    query_heads, window, _ = queries
    # How many positions there are from each token to the end, itself included.
    left = torch.arange(tokens, 0, -1, dtype=torch.float32, device=received.device)
    seeing = left.clamp(max=window)
    if sliding_window is not None and sliding_window < tokens:
        seeing = seeing.sub_((left - sliding_window).clamp_(min=0)).clamp_(min=1)
    mean: torch.Tensor = (received / (seeing * (query_heads // kv_heads))).mean(dim=0)
    return mean
