"""Run one model in both roles of serving: prefill prompts exactly, then read on over KV that was received.

The bench registers an attention with transformers that reads a prompt's received KV from the pool, as decode does.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from prometheus_client import CollectorRegistry
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from spectrumkv.bench.methods.method import Method, Prompt, SentBytes
from spectrumkv.common.model.load import LoadedModel
from spectrumkv.common.telemetry.metrics import Metrics
from spectrumkv.decode_server.kv_pool import Allocation, KvPool
from spectrumkv.kernels.logits import causal_mask, soft_cap
from spectrumkv.prefill_server.engine.attention import hooked_attention
from spectrumkv.prefill_server.tuning.replay import capture_prompt

ATTENTION_NAME = "spectrumkv_bench"


@dataclass
class ReceivedContext:
    """Hold a prompt's received KV and the tokens that the model read after it.

    Attributes:
        allocation: the slots; it also knows which tokens each layer dropped.
        length: number of positions that are filled in every layer.
    """

    allocation: Allocation
    length: int


class ServedModel:
    """Hold a loaded model and a KV pool for one context at a time.

    Args:
        loaded: the model; its attention is switched to the bench's.
        window: how many of a prompt's last queries scorers observe.
        capacity: largest number of tokens of a prompt and what follows it.
    """

    def __init__(self, loaded: LoadedModel, window: int, capacity: int) -> None:
        self.loaded = loaded
        self.metrics = Metrics(CollectorRegistry())
        self._window = window
        self._capacity = capacity
        geometry = loaded.geometry
        slot_bytes = geometry.layers * geometry.native_bytes_per_token_layer
        self._pool = KvPool(geometry, capacity * slot_bytes, loaded.device, self.metrics)
        loaded.model.set_attn_implementation(ATTENTION_NAME)

    def prefill(self, token_ids: Sequence[int]) -> Prompt:
        """Run a prompt once; every method then sends the KV of this one forward pass.

        Args:
            token_ids: the prompt, at least one token.

        Returns:
            The prompt with the queries, keys and values of every layer.
        """
        captured = capture_prompt(self.loaded.model, token_ids, min(self._window, len(token_ids)))
        return Prompt(tuple(token_ids), captured)

    @contextmanager
    def receive(self, method: Method, prompt: Prompt) -> Iterator[tuple[ReceivedContext, SentBytes]]:
        """Send a prompt's KV by a method; the slots are freed when the block ends.

        Args:
            method: how the KV is sent.
            prompt: the prompt.

        Yields:
            The received context, and what sending took.
        """
        with torch.inference_mode(), self._pool.reserve(self._capacity) as allocation:
            sent = method.send(prompt, self._pool, allocation)
            yield ReceivedContext(allocation, len(prompt.token_ids)), sent

    @torch.inference_mode()
    def extend(self, context: ReceivedContext, token_ids: Sequence[int]) -> torch.Tensor:
        """Read m tokens in one forward pass over the context, and append them to it.

        Args:
            context: the received context.
            token_ids: the m tokens.

        Returns:
            The logits, `[m, vocab]` in the model's dtype.
        """
        device = self.loaded.device
        positions = torch.arange(context.length, context.length + len(token_ids), device=device)
        ids = torch.tensor([list(token_ids)], device=device)
        logits: torch.Tensor = self.loaded.model(
            input_ids=ids, position_ids=positions[None], use_cache=False, received=context
        ).logits[0]
        context.length += len(token_ids)
        return logits

    def generate(self, context: ReceivedContext, first_token: int, max_tokens: int) -> Iterator[int]:
        """Yield tokens greedily: `first_token`, then what follows it, up to an end-of-sequence token."""
        token = first_token
        for _ in range(max_tokens - 1):
            yield token
            if token in self.loaded.eos_token_ids:
                return
            token = int(self.extend(context, [token])[-1].argmax())
        yield token


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
    """Attend over received KV, or, without any, as the prefill service does.

    This function is registered with transformers' `AttentionInterface`, so that one model plays both roles without
    being switched between them.

    Args:
        module: the attention layer; its `layer_idx` selects the slots.
        query: `[1, query_heads, m, head_dim]`, after RoPE.
        key: `[1, kv_heads, m, head_dim]`, after RoPE; stored in the slots from `received.length` on.
        value: like `key`.
        attention_mask: the mask of prefill; it is ignored over received KV.
        received: the context that the m tokens follow; None runs prefill.
        options: `scaling`, `sliding_window`, `softcap`, and other options of transformers.

    Returns:
        The attended values, `[1, m, query_heads, head_dim]`, and no weights.
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
    start: int, end: int, sliding_window: int | None, keep_mask: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """Return which positions the queries at `start` to `end` − 1 see.

    Args:
        start: position of the first query.
        end: position after the last query.
        sliding_window: how many of the newest positions a query sees, its own included; None is all.
        keep_mask: bool `[≥ end]`, False for dropped tokens; None if none was dropped.
        device: device of the mask.

    Returns:
        A mask, bool `[end − start, end]`.
    """
    seen = causal_mask(range(start, end), end, sliding_window, device)
    return seen if keep_mask is None else seen & keep_mask[:end]


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    seen: torch.Tensor,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """Compute attention in float32, so that differences come from the KV; shapes are `attend`'s without the batch.

    Returns:
        What each query reads, `[queries, query_heads, head_dim]` in the query's dtype.
    """
    kv_heads, tokens, head_dim = keys.shape
    query_heads, queries, _ = query.shape
    # Query heads that share a KV head are rows of one matrix, so grouped-query attention repeats no keys.
    grouped = (query.float() * scaling).reshape(kv_heads, -1, head_dim)
    logits = grouped @ keys.float().transpose(1, 2)
    if softcap is not None:
        soft_cap(logits, softcap, out=logits)
    logits.view(-1, queries, tokens).masked_fill_(~seen, -math.inf)
    attended = torch.softmax(logits, dim=-1) @ values.float()
    return attended.view(query_heads, queries, head_dim).transpose(0, 1).to(query.dtype)


AttentionInterface.register(ATTENTION_NAME, attend)
# The masks of prefill; transformers also makes them over received KV, where they are ignored.
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
