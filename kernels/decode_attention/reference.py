"""Attention of one decode step in plain torch, row by row: any dtype, dropped tokens, bounded logits.

It runs on CPUs where the compiled loops do not fit, and is what they and the Triton kernel must agree with.
"""

import math

import torch
from torch.nn import functional as F

from spectrumkv.kernels.logits import soft_cap


def decode_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    keep_mask: torch.Tensor | None,
    firsts: torch.Tensor,
    newest: torch.Tensor,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attend over a run of slots for each row of a batch.

    Args:
        queries: any float dtype `[batch, query_heads, head_dim]`; see `dispatch.decode_attention`.
        keys: in the queries' dtype, `[kv_heads, slots, head_dim]`.
        values: like `keys`.
        keep_mask: bool `[slots]`, False where a token was dropped; None where none was.
        firsts: int64 `[batch]`, the first slot of each row.
        newest: int64 `[batch]`, its last; that one is kept.
        scaling: factor of query · key before the softmax.
        sliding_window: how many of the newest slots a row sees; None is all.
        softcap: bound of the logits; None is no bound.

    Returns:
        `[batch, query_heads, head_dim]` in the queries' dtype.
    """
    rows = []
    for query, first, last in zip(queries, firsts.tolist(), newest.tolist(), strict=True):
        end = last + 1
        seen = slice(max(first, end - sliding_window) if sliding_window else first, end)
        # A row without dropped tokens needs no mask, which would cost it torch's fastest way.
        mask = None if keep_mask is None or bool(keep_mask[first:end].all()) else keep_mask[None, seen]
        rows.append(_attend(query, keys[:, seen], values[:, seen], mask, scaling, softcap))
    return torch.stack(rows)


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    keep_mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """Return the attention of one token: `[query_heads, head_dim]`."""
    kv_heads, _, head_dim = keys.shape
    # Query heads that share a KV head are rows of one matrix: no repeated keys under grouped-query attention.
    grouped = query.reshape(kv_heads, -1, head_dim)
    if softcap is None:
        attended = F.scaled_dot_product_attention(
            grouped[None], keys[None], values[None], attn_mask=keep_mask, scale=scaling
        )[0]
    else:
        logits = soft_cap(grouped @ keys.transpose(1, 2), softcap, scaling=scaling)
        if keep_mask is not None:
            logits = logits.masked_fill(~keep_mask, -math.inf)
        attended = logits.softmax(dim=-1, dtype=torch.float32).to(values.dtype) @ values
    return attended.reshape(-1, head_dim)
