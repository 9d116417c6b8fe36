"""Attention of one decode step over the slots of the requests in the batch."""

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
    """Say where the requests of one decode step have their cache, in tensors that the device reads.

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

    def keep_mask(self, layer: int) -> torch.Tensor | None:
        """Return which slots attention may look at: bool `[slots]`, False where a token was dropped."""
        return self.pool.keep_mask[layer]


@dataclass(frozen=True, eq=False)
class HostDecodeMetadata(DecodeMetadata):
    """Describe a step on a CPU, where it is known which rows have no dropped tokens.

    Attributes:
        allocations: one for each row of the batch.
    """

    allocations: Sequence[Allocation]

    @classmethod
    def of(cls, allocations: Sequence[Allocation], positions: Sequence[int]) -> "HostDecodeMetadata":
        """Look up where each row's slots begin and end.

        Args:
            allocations: of at least one row, all from one pool.
            positions: of the token that this step reads, one for each row.

        Returns:
            The metadata of one step, on the host.
        """
        firsts = torch.tensor([allocation.start for allocation in allocations])
        return cls(allocations[0].pool, firsts, firsts + torch.tensor(positions), allocations)

    def keep_mask(self, layer: int) -> torch.Tensor | None:
        """Return which slots attention may look at: bool `[slots]`, or None where no row has a gap in this layer."""
        if all(allocation.keep_mask(layer) is None for allocation in self.allocations):
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
