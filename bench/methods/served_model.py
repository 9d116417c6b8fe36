"""One model in both roles of serving: it prefills prompts exactly, and reads on over KV that was received."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from prometheus_client import CollectorRegistry

from spectrumkv.bench.methods.attention import ATTENTION_NAME, ReceivedContext
from spectrumkv.bench.methods.rows import MethodName
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.model.load import LoadedModel
from spectrumkv.common.telemetry.metrics import Metrics
from spectrumkv.decode_server.kv_pool import Allocation, KvPool
from spectrumkv.prefill_server.tuning.replay import CapturedPrompt, capture_prompt


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt that the model has run, exactly.

    Attributes:
        token_ids: its tokens.
        captured: what the layers showed while it ran.
    """

    token_ids: tuple[int, ...]
    captured: CapturedPrompt


@dataclass(frozen=True)
class SentBytes:
    """What sending a prompt's KV took.

    Attributes:
        counted: bytes, everything included that the method says it counts.
        nominal_budget: the paper's mean cost per token; scales and framing left out.
    """

    counted: float
    nominal_budget: float


class Method(MethodName, Protocol):
    """One way to get a prompt's KV from prefill to decode, at one setting."""

    def send(self, prompt: Prompt, pool: KvPool, allocation: Allocation) -> SentBytes:
        """Put the prompt's KV into the first slots of the allocation, as decode would receive it."""
        ...


class ExactFp16:
    """The reference: every token's KV rounded to the 16-bit dtype and nothing else, in no messages at all."""

    policy, codec, scorer, scope, budget = "exact", "fp16", "", "", 1.0

    def send(self, prompt: Prompt, pool: KvPool, allocation: Allocation) -> SentBytes:
        """See `Method.send`."""
        for layer in prompt.captured.layers:
            store_fp16(allocation, layer.layer, layer.keys, layer.values, pool.geometry)
        return SentBytes(pool.geometry.fp16_bytes(len(prompt.token_ids)), 1.0)


def store_fp16(
    allocation: Allocation, layer: int, keys: torch.Tensor, values: torch.Tensor, geometry: KvGeometry
) -> None:
    """Write one layer's `[kv_heads, n, head_dim]` keys and values into the first n slots, rounded to 16 bits."""
    tokens = keys.shape[1]
    allocation.keys(layer, 0, tokens).copy_(keys.to(geometry.half_dtype))
    allocation.values(layer, 0, tokens).copy_(values.to(geometry.half_dtype))


class ServedModel:
    """A loaded model with slots for one context at a time.

    Args:
        loaded: the model; its attention is switched to the bench's.
        window: how many of the last queries of a prompt's layers scorers see.
        capacity: most tokens of a prompt and what follows it.
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
        """Run a prompt once; every method then sends the KV of this one pass."""
        captured = capture_prompt(self.loaded.model, token_ids, min(self._window, len(token_ids)))
        return Prompt(tuple(token_ids), captured)

    @contextmanager
    def receive(self, method: Method, prompt: Prompt) -> Iterator[tuple[ReceivedContext, SentBytes]]:
        """Send a prompt's KV by a method; the slots are free again when the block ends."""
        with torch.inference_mode(), self._pool.reserve(self._capacity) as allocation:
            sent = method.send(prompt, self._pool, allocation)
            yield ReceivedContext(allocation, len(prompt.token_ids)), sent

    @torch.inference_mode()
    def extend(self, context: ReceivedContext, token_ids: Sequence[int]) -> torch.Tensor:
        """Read m tokens, in one pass, over what the context holds so far; they join it.

        Returns:
            logits, `[m, vocab]` in the model's dtype.
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
