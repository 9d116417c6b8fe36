"""Attention of one decode step over the slots of the requests in the batch."""

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
# Torch's attention takes one call for each row and uses at most one thread for each KV head. It is faster than the
# compiled call where it has at least `MANY_THREADS` threads and rows have at least `SHORT_TOKENS` tokens on average.
MANY_THREADS, SHORT_TOKENS = 4, 1024


@dataclass(frozen=True, eq=False)
class DecodeMetadata:
    """Says where the requests of one decode step have their cache, in tensors that the device reads.

    Attributes:
        pool: has the slots.
        firsts: int64 `[batch]` on the pool's device, the first slot of each row.
        newest: like `firsts`, the slot of the token that this step computes.
    """

    pool: KvPool
    firsts: torch.Tensor
    newest: torch.Tensor

    def store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write the step's keys and values into the slots.

        Args:
            layer: from 0.
            key: `[batch, kv_heads, 1, head_dim]` in the model's own dtype, after RoPE.
            value: like `key`.
        """
        self.pool.keys[layer].index_copy_(1, self.newest, key[:, :, 0].transpose(0, 1))
        self.pool.values[layer].index_copy_(1, self.newest, value[:, :, 0].transpose(0, 1))


@dataclass(frozen=True, eq=False)
class HostDecodeMetadata(DecodeMetadata):
    """Says it on a CPU, where attention may treat each row in its own way.

    Attributes:
        allocations: the slots of each row.
        positions: the position of the token that this step computes, for each row.
    """

    allocations: Sequence[Allocation]
    positions: Sequence[int]

    @classmethod
    def of(cls, allocations: Sequence[Allocation], positions: Sequence[int]) -> "HostDecodeMetadata":
        """Return the slots of a step's rows, of which there is at least one."""
        firsts = torch.tensor([allocation.start for allocation in allocations])
        return cls(allocations[0].pool, firsts, firsts + torch.tensor(positions), allocations, positions)

    def fits_one_call(self, layer: int) -> bool:
        """Return whether one compiled call can do all rows of this layer, and does them faster than torch.

        It cannot where a row has dropped tokens.
        """
        keys = self.pool.keys[layer]
        kv_heads, _, head_dim = keys.shape
        short = sum(self.positions) < len(self.positions) * SHORT_TOKENS
        return (
            keys.dtype == torch.float32
            and decode_attention_cpu.attends(head_dim)
            and (short or min(torch.get_num_threads(), kv_heads) < MANY_THREADS)
            and all(allocation.keep_mask(layer) is None for allocation in self.allocations)
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
    """Store the step's keys and values in the slots, and attend over each request's own slots.

    transformers calls it through `AttentionInterface`. The pool's keep mask says which tokens were dropped, so
    `attention_mask` is None.

    Args:
        module: the attention layer, which has a `layer_idx`.
        query: `[batch, query_heads, 1, head_dim]` in the model's own dtype, after RoPE.
        key: `[batch, kv_heads, 1, head_dim]` in the model's own dtype, after RoPE.
        value: like `key`.
        attention_mask: not used.
        metadata: where each row's cache is.
        scaling: factor of the attention logits.
        sliding_window: how many of the newest positions this layer sees, its own included; None is all.
        softcap: bound on the attention logits (Gemma 2, arXiv 2408.00118, section 2); None is none.

    Returns:
        `[batch, 1, query_heads, head_dim]` in the model's own dtype, and None for the weights.
    """
    layer = int(module.layer_idx)  # type: ignore[arg-type]  # torch types module attributes as tensors
    metadata.store(layer, key, value)
    if not isinstance(metadata, HostDecodeMetadata):
        return _attend_on_gpu(layer, query, metadata, scaling, sliding_window, softcap), None
    if softcap is None and metadata.fits_one_call(layer):
        return _attend_in_one_call(layer, query, metadata, scaling, sliding_window), None
    outputs = []
    for row, (allocation, position) in enumerate(zip(metadata.allocations, metadata.positions, strict=True)):
        end = position + 1
        first = max(0, end - sliding_window) if sliding_window else 0
        keep_mask = allocation.keep_mask(layer)
        outputs.append(
            _attend(
                query[row],
                allocation.keys(layer, first, end),
                allocation.values(layer, first, end),
                None if keep_mask is None else keep_mask[None, first:end],
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
    """Return attention of all rows, `[batch, 1, query_heads, head_dim]`; no length is copied to the CPU."""
    # Triton takes a while to import, and exists on Linux only.
    from spectrumkv.kernels.decode_attention import triton as decode_attention_triton

    pool = metadata.pool
    return decode_attention_triton.decode_attention(
        query[:, :, 0],
        pool.keys[layer],
        pool.values[layer],
        pool.keep_mask[layer],
        metadata.firsts,
        metadata.newest,
        scaling,
        sliding_window,
        softcap,
    ).unsqueeze(1)


def _attend_in_one_call(
    layer: int, query: torch.Tensor, metadata: HostDecodeMetadata, scaling: float, sliding_window: int | None
) -> torch.Tensor:
    """Return attention of all rows, `[batch, 1, query_heads, head_dim]`, from one compiled call."""
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
    keep_mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """Return attention of one row, `[query_heads, 1, head_dim]` → `[1, query_heads, head_dim]`."""
    kv_heads, _, head_dim = keys.shape
    # Query heads that share a KV head are rows of one matrix: no repeated keys under grouped-query attention.
    grouped = query.view(kv_heads, -1, head_dim)
    if softcap is None:
        attended = F.scaled_dot_product_attention(
            grouped[None], keys[None], values[None], attn_mask=keep_mask, scale=scaling
        )[0]
    else:
        logits = softcap * torch.tanh(grouped @ keys.transpose(1, 2) * (scaling / softcap))
        if keep_mask is not None:
            logits = logits.masked_fill(~keep_mask, -math.inf)
        attended = logits.softmax(dim=-1, dtype=torch.float32).to(values.dtype) @ values
    return attended.reshape(1, -1, head_dim)


AttentionInterface.register(ATTENTION_NAME, attend_slots)
