"""Attention over received KV: the prompt as it came off the wire, then the tokens that followed it."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from spectrumkv.decode_server.kv_pool import Allocation
from spectrumkv.kernels.logits import causal_mask, soft_cap
from spectrumkv.prefill_server.engine.attention import hooked_attention

ATTENTION_NAME = "spectrumkv_bench"


@dataclass
class ReceivedContext:
    """A prompt's received KV and the tokens that the model read after it.

    Attributes:
        allocation: the slots; a layer's dropped tokens are marked there.
        length: positions that are filled in every layer.
    """

    allocation: Allocation
    length: int


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    received: ReceivedContext | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend over `received`, or, without it, as prefill does.

    Registered with transformers' `AttentionInterface`, so that one model serves as prefill and as decode without
    being switched between them.

    Args:
        module: the attention layer; its `layer_idx` says which slots.
        query: `[1, query_heads, m, head_dim]`, after RoPE.
        key: `[1, kv_heads, m, head_dim]`, after RoPE; stored in the slots from `received.length` on.
        value: like `key`.
        attention_mask: of prefill; over received KV the slots say what is seen.
        received: where the prefix is; the m tokens follow it.
        options: `scaling`, `sliding_window`, `softcap`, and what else transformers hands over.

    Returns:
        `[1, m, query_heads, head_dim]` and no weights.
    """
    if received is None:
        return hooked_attention(module, query, key, value, attention_mask, **options)
    layer = int(module.layer_idx)  # type: ignore[arg-type]  # torch types module attributes as tensors
    start, end = received.length, received.length + query.shape[2]
    slots = received.allocation
    slots.keys(layer, start, end).copy_(key[0])
    slots.values(layer, start, end).copy_(value[0])
    seen = visible(start, end, options.get("sliding_window"), slots.keep_mask(layer), query.device)
    attended = _attend(
        query[0],
        slots.keys(layer, 0, end),
        slots.values(layer, 0, end),
        seen,
        options["scaling"],
        options.get("softcap"),
    )
    return attended[None], None


def visible(
    start: int, end: int, sliding_window: int | None, kept: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """Which positions the queries at `start` to `end` − 1 see.

    Args:
        start: position of the first query.
        end: one past the last query.
        sliding_window: the newest positions that a query sees, its own included; None is all.
        kept: bool `[≥ end]`, False where a token was dropped; None where none was.
        device: where the mask is wanted.

    Returns:
        bool `[end − start, end]`.
    """
    seen = causal_mask(range(start, end), end, sliding_window, device)
    return seen if kept is None else seen & kept[:end]


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    seen: torch.Tensor,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """Attention in float32, so that differences are the KV's; from and to `attend`'s shapes without the batch."""
    kv_heads, tokens, head_dim = keys.shape
    query_heads, queries, _ = query.shape
    # Query heads that share a KV head are rows of one matrix: no repeated keys under grouped-query attention.
    grouped = (query.float() * scaling).reshape(kv_heads, -1, head_dim)
    logits = grouped @ keys.float().transpose(1, 2)
    if softcap is not None:
        soft_cap(logits, softcap, out=logits)
    logits.view(-1, queries, tokens).masked_fill_(~seen, -math.inf)
    attended = torch.softmax(logits, dim=-1) @ values.float()
    return attended.view(query_heads, queries, head_dim).transpose(0, 1).to(query.dtype)


AttentionInterface.register(ATTENTION_NAME, attend)
# Prefill's masks; over received KV they are made and not used.
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
