"""Attention of one decode step over the slots of many requests."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface

from spectrumkv.decode_server.slots import Reservation

ATTENTION_NAME = "spectrumkv_decode"


@dataclass(frozen=True)
class StepSlots:
    """Where the requests of one decode step have their cache.

    Attributes:
        reservations: one for each row of the batch.
        positions: for each row, the position of the token that this step reads.
    """

    reservations: Sequence[Reservation]
    positions: Sequence[int]


def attend_slots(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    step_slots: StepSlots,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Store the step's keys and values in the slots and attend over each request's own.

    Registered with transformers' `AttentionInterface`; masks come from the slots, so `attention_mask` is None.

    Args:
        module: the attention layer; its `layer_idx` says which slots.
        query: `[batch, query_heads, 1, head_dim]`, after RoPE.
        key: `[batch, kv_heads, 1, head_dim]`, after RoPE.
        value: like `key`.
        attention_mask: not used.
        step_slots: where each row's cache is.
        scaling: factor of the attention logits.
        sliding_window: the newest positions that this layer sees, itself included.
        softcap: Gemma 2's bound on the attention logits.

    Returns:
        `[batch, 1, query_heads, head_dim]` and no weights.
    """
    layer = int(module.layer_idx)  # type: ignore[arg-type]  # torch types module attributes as tensors
    outputs = []
    for row, (reservation, position) in enumerate(zip(step_slots.reservations, step_slots.positions, strict=True)):
        end = position + 1
        reservation.keys(layer, position, end).copy_(key[row])
        reservation.values(layer, position, end).copy_(value[row])
        first = max(0, end - sliding_window) if sliding_window else 0
        kept = reservation.kept[layer]
        outputs.append(
            _attend(
                query[row],
                reservation.keys(layer, first, end),
                reservation.values(layer, first, end),
                None if kept is None else kept[None, first:end],
                scaling,
                softcap,
            )
        )
    return torch.stack(outputs), None


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    kept: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """Attention of one token, `[query_heads, 1, head_dim]` → `[1, query_heads, head_dim]`."""
    kv_heads, _, head_dim = keys.shape
    # Query heads that share a KV head are rows of one matrix: no repeated keys under grouped-query attention.
    grouped = query.view(kv_heads, -1, head_dim)
    if softcap is None:
        attended = F.scaled_dot_product_attention(
            grouped[None], keys[None], values[None], attn_mask=kept, scale=scaling
        )[0]
    else:
        logits = softcap * torch.tanh(grouped @ keys.transpose(1, 2) * (scaling / softcap))
        if kept is not None:
            logits = logits.masked_fill(~kept, -math.inf)
        attended = logits.softmax(dim=-1, dtype=torch.float32).to(values.dtype) @ values
    return attended.reshape(1, -1, head_dim)


AttentionInterface.register(ATTENTION_NAME, attend_slots)
