"""Attention of one decode step over the slots of many requests."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface

from spectrumkv.decode_server.kv_pool import Allocation, KvPool
from spectrumkv.kernels.decode_attention import cpu as decode_attention_cpu

ATTENTION_NAME = "spectrumkv_decode"
# Torch's attention takes a call for each row, and at most a thread for each KV head. With so many threads it is the
# faster one, where rows have no fewer tokens than this on average.
MANY_THREADS, SHORT_TOKENS = 4, 1024


@dataclass(frozen=True, eq=False)
class DecodeMetadata:
    """Where the requests of one decode step have their cache, as the device that runs it needs to know.

    Attributes:
        pool: whose slots they are.
        firsts: int64 `[batch]` on the pool's device, the first slot of each row.
        newest: like `firsts`, the slot of the token that this step reads.
    """

    pool: KvPool
    firsts: torch.Tensor
    newest: torch.Tensor

    def store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Put the step's keys and values, `[batch, kv_heads, 1, head_dim]`, into their slots."""
        self.pool.keys[layer].index_copy_(1, self.newest, key[:, :, 0].transpose(0, 1))
        self.pool.values[layer].index_copy_(1, self.newest, value[:, :, 0].transpose(0, 1))


@dataclass(frozen=True, eq=False)
class HostDecodeMetadata(DecodeMetadata):
    """The same on a CPU, where each row may be attended to in its own way.

    Attributes:
        allocations: one for each row of the batch.
        positions: for each row, the position of the token that this step reads.
    """

    allocations: Sequence[Allocation]
    positions: Sequence[int]

    @classmethod
    def of(cls, allocations: Sequence[Allocation], positions: Sequence[int]) -> "HostDecodeMetadata":
        """Look up the slots of at least one row."""
        firsts = torch.tensor([allocation.start for allocation in allocations])
        return cls(allocations[0].pool, firsts, firsts + torch.tensor(positions), allocations, positions)

    def together(self, layer: int) -> bool:
        """Whether one compiled call does all rows of this layer, and faster than torch: none may have gaps."""
        keys = self.pool.keys[layer]
        kv_heads, _, head_dim = keys.shape
        short = sum(self.positions) < len(self.positions) * SHORT_TOKENS
        return (
            keys.dtype == torch.float32
            and decode_attention_cpu.attends(head_dim)
            and (short or min(torch.get_num_threads(), kv_heads) < MANY_THREADS)
            and all(allocation.kept(layer) is None for allocation in self.allocations)
        )


def attend_slots(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    metadata: DecodeMetadata,
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
        metadata: where each row's cache is.
        scaling: factor of the attention logits.
        sliding_window: the newest positions that this layer sees, itself included.
        softcap: Gemma 2's bound on the attention logits.

    Returns:
        `[batch, 1, query_heads, head_dim]` and no weights.
    """
    layer = int(module.layer_idx)  # type: ignore[arg-type]  # torch types module attributes as tensors
    metadata.store(layer, key, value)
    if not isinstance(metadata, HostDecodeMetadata):
        return _attend_on_gpu(layer, query, metadata, scaling, sliding_window, softcap), None
    if softcap is None and metadata.together(layer):
        return _attend_together(layer, query, metadata, scaling, sliding_window), None
    outputs = []
    for row, (allocation, position) in enumerate(zip(metadata.allocations, metadata.positions, strict=True)):
        end = position + 1
        first = max(0, end - sliding_window) if sliding_window else 0
        kept = allocation.kept(layer)
        outputs.append(
            _attend(
                query[row],
                allocation.keys(layer, first, end),
                allocation.values(layer, first, end),
                None if kept is None else kept[None, first:end],
                scaling,
                softcap,
            )
        )
    return torch.stack(outputs), None


def _attend_on_gpu(
    layer: int,
    query: torch.Tensor,
    metadata: DecodeMetadata,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attention of all rows, `[batch, 1, query_heads, head_dim]`, without a look at how long they are."""
    # Triton takes a while to import, and exists on Linux only.
    from spectrumkv.kernels.decode_attention import triton as decode_attention_triton

    pool = metadata.pool
    return decode_attention_triton.decode_attention(
        query[:, :, 0],
        pool.keys[layer],
        pool.values[layer],
        pool.kept[layer],
        metadata.firsts,
        metadata.newest,
        scaling,
        sliding_window,
        softcap,
    ).unsqueeze(1)


def _attend_together(
    layer: int, query: torch.Tensor, metadata: HostDecodeMetadata, scaling: float, sliding_window: int | None
) -> torch.Tensor:
    """Attention of all rows in one call: `[batch, 1, query_heads, head_dim]`."""
    pool, ends = metadata.pool, metadata.newest + 1
    firsts = metadata.firsts
    if sliding_window:
        firsts = torch.maximum(firsts, ends - sliding_window)
    keys, values = pool.keys[layer], pool.values[layer]
    attended = decode_attention_cpu.decode_attention(query[:, :, 0], keys, values, firsts, ends, scaling)
    return attended.unsqueeze(1)


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
