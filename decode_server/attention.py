"""Attention of one decode step over the slots of many requests."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface

from spectrumkv.decode_server.kv_pool import Allocation, KvPool
from spectrumkv.kernels.decode_attention import decode_attention

ATTENTION_NAME = "spectrumkv_decode"


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

    def keep_mask(self, layer: int) -> torch.Tensor | None:
        """Return which slots attention may look at: bool `[slots]`, False where a token was dropped."""
        return self.pool.kept[layer]


@dataclass(frozen=True, eq=False)
class HostDecodeMetadata(DecodeMetadata):
    """The same on a CPU, where it is known which rows have no dropped tokens.

    Attributes:
        allocations: one for each row of the batch.
    """

    allocations: Sequence[Allocation]

    @classmethod
    def of(cls, allocations: Sequence[Allocation], positions: Sequence[int]) -> "HostDecodeMetadata":
        """Look up the slots of at least one row, each with the position of the token that this step reads."""
        firsts = torch.tensor([allocation.start for allocation in allocations])
        return cls(allocations[0].pool, firsts, firsts + torch.tensor(positions), allocations)

    def keep_mask(self, layer: int) -> torch.Tensor | None:
        """Return which slots attention may look at, or None where no row has a gap in this layer."""
        if all(allocation.kept(layer) is None for allocation in self.allocations):
            return None
        return super().keep_mask(layer)


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
    attended = decode_attention(
        query[:, :, 0],
        metadata.pool.keys[layer],
        metadata.pool.values[layer],
        metadata.keep_mask(layer),
        metadata.firsts,
        metadata.newest,
        scaling,
        sliding_window,
        softcap,
    )
    return attended.unsqueeze(1), None


AttentionInterface.register(ATTENTION_NAME, attend_slots)
