"""Attention of the prompt, with a hook that gets each layer's queries, keys and values while the layer runs."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.kernels.logits import causal_mask, soft_cap

ATTENTION_NAME = "spectrumkv_prefill"
# Queries whose attention logits are in memory at once where soft-capping rules out the fused kernels.
SOFTCAP_QUERY_BLOCK = 256

KvHook = Callable[[LayerCapture], None]


def hooked_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    kv_hooks: Sequence[KvHook] = (),
    lengths: Sequence[int] | None = None,
    window: int = 1,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Show this layer to the hooks, then attend as transformers' `sdpa` does (`eager` where logits are capped).

    Registered with transformers' `AttentionInterface`. Hooks are called before the layer attends, so that its KV
    leaves while the layer still computes. Shorter prompts of a batch are padded on the right, where causal attention
    lets no real token see the padding.

    Args:
        module: the attention layer.
        query: `[batch, query_heads, n, head_dim]` in the model's dtype, after RoPE.
        key: `[batch, kv_heads, n, head_dim]`, after RoPE; more than n where earlier tokens are in a cache.
        value: like `key`.
        attention_mask: as transformers made it: None or bool, broadcastable to `[batch, 1, n, keys]`.
        scaling: factor of the attention logits.
        sliding_window: how many of the newest positions this layer sees; the mask holds it already.
        softcap: Gemma 2's bound on the attention logits.
        kv_hooks: one for each prompt, called with the layer's capture; none for calls without hooks.
        lengths: tokens of each prompt; None is n for all.
        window: how many of the last queries the hook gets.
        options: whatever else transformers passes on.

    Returns:
        `[batch, n, query_heads, head_dim]` in the dtype of `query`, and None in place of attention weights.
    """
    for row, kv_hook in enumerate(kv_hooks):
        # With a cache there are more keys than queries, and no padding.
        end, tokens = query.shape[2:3] + key.shape[2:3] if lengths is None else (lengths[row],) * 2
        keys, values = key[row, :, :tokens], value[row, :, :tokens]
        if len(kv_hooks) > 1:
            # One prompt whose KV waits for a slow link would keep that of all others of the pass.
            keys, values = keys.clone(), values.clone()
        kv_hook(
            LayerCapture(
                # A view would keep all queries, which may take more than keys and values, until the KV has left.
                queries=query[row, :, max(0, end - window) : end].clone(),
                keys=keys,
                values=values,
                scaling=scaling,
                softcap=softcap,
                sliding_window=sliding_window,
                layer=int(module.layer_idx),  # type: ignore[arg-type]  # torch types attributes as tensors
            )
        )
    if key.shape[2] > query.shape[2] > 1 and softcap is None and sliding_window is None and not query.is_cuda:
        return _attention_after_past(query, key, value, scaling), None
    if softcap is None:
        attended: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
        return attended
    return _softcapped_attention(query, key, value, attention_mask, scaling, softcap), None


def _attention_after_past(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Attend causally from a prompt's later chunk on a CPU: over earlier chunks and over itself, then join both.

    With one mask over all queries and keys, every layer would convert the mask and compute what it hides; neither
    half needs a mask. The halves are joined as the blocks of FlashAttention are (arXiv 2205.14135, section 3.1), by
    the logarithms of their softmax's denominators.

    Args:
        query: `[1, query_heads, n, head_dim]`.
        key: `[1, kv_heads, past + n, head_dim]`.
        value: like `key`.
        scaling: factor of the attention logits.

    Returns:
        `[1, n, query_heads, head_dim]`.
    """
    kv_heads, queries = key.shape[1], query.shape[2]
    past = key.shape[2] - queries
    group = query.shape[1] // kv_heads
    # Query heads that share a KV head are rows of one matrix where nothing depends on their order.
    grouped = query.reshape(1, kv_heads, group * queries, -1)
    before, before_level = _flash_attention(grouped, key[:, :, :past], value[:, :, :past], False, scaling)
    own_keys, own_values = (one[:, :, past:].repeat_interleave(group, dim=1) for one in (key, value))
    own, own_level = _flash_attention(query, own_keys, own_values, True, scaling)
    share = torch.sigmoid(before_level.reshape(own_level.shape) - own_level).unsqueeze(-1).to(own.dtype)
    return torch.lerp(own, before.reshape(own.shape), share).transpose(1, 2)


def _flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the queries attend to, and for each the logarithm of its softmax's denominator."""
    attended, level = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, scale=scaling
    )
    return attended, level


def _softcapped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float,
) -> torch.Tensor:
    """Attend causally with capped logits, a block of queries at a time, so that no n × n matrix is ever made.

    Returns:
        `[batch, n, query_heads, head_dim]`, as `hooked_attention` does.
    """
    batch, query_heads, queries, head_dim = query.shape
    kv_heads, tokens = key.shape[1], key.shape[2]
    grouped = query.view(batch, kv_heads, query_heads // kv_heads, queries, head_dim)
    keys, values = key.unsqueeze(2), value.unsqueeze(2)
    attended = torch.empty_like(grouped)
    for first in range(0, queries, SOFTCAP_QUERY_BLOCK):
        rows = slice(first, min(first + SOFTCAP_QUERY_BLOCK, queries))
        logits = grouped[..., rows, :] @ keys.transpose(-1, -2) * scaling
        logits = soft_cap(logits, softcap)
        if mask is None:
            positions = range(tokens - queries + rows.start, tokens - queries + rows.stop)
            seen = causal_mask(positions, tokens, None, query.device)
        else:
            seen = mask[:, :, None, rows]
        weights = logits.masked_fill(~seen, -math.inf).softmax(dim=-1, dtype=torch.float32)
        attended[..., rows, :] = weights.to(values.dtype) @ values
    return attended.view(batch, query_heads, queries, head_dim).transpose(1, 2)


AttentionInterface.register(ATTENTION_NAME, hooked_attention)
# The masks of `sdpa` are None where plain causality is enough, and have sliding windows built in.
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
