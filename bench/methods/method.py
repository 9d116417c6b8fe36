"""Define what a method is: a way to get a prompt's KV from prefill to decode; and the exact method, the reference."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.tiers import Tier
from spectrumkv.decode_server.kv_pool import Allocation, KvPool
from spectrumkv.prefill_server.tuning.replay import CapturedPrompt


class MethodName(Protocol):
    """Identify a method in results.

    Attributes:
        policy: name of the policy or baseline.
        codec: name of the codec.
        scorer: name of the scorer; empty if the method does not rank tokens.
        scope: "layer" or "model"; empty for methods without a scope.
        budget: the target budget.
    """

    @property
    def policy(self) -> str: ...  # noqa: D102
    @property
    def codec(self) -> str: ...  # noqa: D102
    @property
    def scorer(self) -> str: ...  # noqa: D102
    @property
    def scope(self) -> str: ...  # noqa: D102
    @property
    def budget(self) -> float: ...  # noqa: D102


@dataclass(frozen=True, eq=False)
class Prompt:
    """Hold a prompt that the model has run exactly.

    Attributes:
        token_ids: its tokens.
        captured: what the layers showed while the model ran it.
    """

    token_ids: tuple[int, ...]
    captured: CapturedPrompt


@dataclass(frozen=True)
class SentBytes:
    """Count what sending a prompt's KV took.

    Attributes:
        counted: all bytes that the method counts.
        budget_nominal: the paper's mean cost per token, without scales and framing.
    """

    counted: float
    budget_nominal: float


def mean_tier_cost(tokens: Mapping[Tier, int]) -> float:
    """Average the tokens' tier cost: the SpectrumKV paper's normalized budget b, as it came out.

    Args:
        tokens: how many there are at each tier.

    Returns:
        From 0, where all are dropped, to 1; 0 where there are none.
    """
    total = sum(tokens.values())
    return sum(tier.nominal_cost * count for tier, count in tokens.items()) / total if total else 0.0


class Method(MethodName, Protocol):
    """Describe a way to get a prompt's KV from prefill to decode, at one setting."""

    def send(self, prompt: Prompt, pool: KvPool, allocation: Allocation) -> SentBytes:
        """Write the prompt's KV, as decode would receive it, into the first slots of the allocation.

        Args:
            prompt: the prompt of n tokens.
            pool: the pool of the allocation.
            allocation: at least n slots.

        Returns:
            What sending took.
        """
        ...


class ExactFp16:
    """Round every token's KV to the 16-bit dtype and send no message: what methods are compared with."""

    policy, codec, scorer, scope, budget = "exact", "fp16", "", "", 1.0

    def send(self, prompt: Prompt, pool: KvPool, allocation: Allocation) -> SentBytes:
        """Return what sending took; see `Method.send`."""
        for layer in prompt.captured.layers:
            store_fp16(allocation, layer.layer, layer.keys, layer.values, pool.geometry)
        return SentBytes(pool.geometry.fp16_bytes(len(prompt.token_ids)), 1.0)


class ExactNative:
    """Keep every token's KV as prefill computed it: what engines are compared with that decode over such KV."""

    policy, codec, scorer, scope, budget = "exact", "native", "", "", 1.0

    def send(self, prompt: Prompt, pool: KvPool, allocation: Allocation) -> SentBytes:
        """Return the bytes of the same KV at FP16, as for the other reference; see `Method.send`."""
        for layer in prompt.captured.layers:
            _store(allocation, layer.layer, layer.keys, layer.values)
        return SentBytes(pool.geometry.fp16_bytes(len(prompt.token_ids)), 1.0)


# What methods may be compared with, by name.
REFERENCES: dict[str, "Method"] = {"fp16": ExactFp16(), "native": ExactNative()}


def store_fp16(
    allocation: Allocation, layer: int, keys: torch.Tensor, values: torch.Tensor, geometry: KvGeometry
) -> None:
    """Write one layer's keys and values, rounded to 16 bits, into the first n slots of an allocation.

    Args:
        allocation: at least n slots.
        layer: index of the layer.
        keys: `[kv_heads, n, head_dim]`.
        values: like `keys`.
        geometry: of the model; its half dtype is what the states are rounded to.
    """
    _store(allocation, layer, keys.to(geometry.half_dtype), values.to(geometry.half_dtype))


def _store(allocation: Allocation, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
    tokens = keys.shape[1]
    allocation.keys(layer, 0, tokens).copy_(keys)
    allocation.values(layer, 0, tokens).copy_(values)


def describe(method: MethodName) -> str:
    """Return a method in a few words."""
    scorer = f", {method.scorer}" if method.scorer else ""
    return f"{method.policy} ({method.codec}{scorer}) at {method.budget:g}"
