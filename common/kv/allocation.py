"""Who decides the tiers of a prompt's tokens, layer by layer: a policy by their scores, or a codec.

A policy sees one layer at a time, or all of them combined. What it may spend on a layer depends on which layers can
be trusted at INT4, which the probe finds out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.kv.policies.base import Policy, TierRequest, whole_tokens
from spectrumkv.common.kv.policies.ranks import ranked
from spectrumkv.common.kv.scoring import combine, scorers
from spectrumkv.common.kv.tiers import Tier
from spectrumkv.kernels.tier_placement import TierRanks


@dataclass(frozen=True, eq=False)
class RankedTiers:
    """The tiers of a layer's tokens, which follow from scores that lie on a GPU.

    Attributes:
        scores: float32 `[n]` on the GPU; whether they are finite is not known yet.
        ranks: which tiers the tokens get by their rank.
    """

    scores: torch.Tensor
    ranks: TierRanks

    def on_host(self) -> torch.Tensor:
        """Wait for the scores, and make tiers of them on the CPU.

        Returns:
            uint8 `[n]` on the CPU.

        Raises:
            NotFiniteError: a score is infinite or NaN.
        """
        return ranked(self.scores, self.ranks)


class TierAllocation(Protocol):
    """What decides the tiers of one prompt's tokens, layer by layer."""

    def tiers(self, capture: LayerCapture) -> torch.Tensor | RankedTiers:
        """Give the tokens of the next layer their tiers.

        Args:
            capture: the layer.

        Returns:
            uint8 `[n]` on the CPU, `Tier` values; or what they follow from, where a GPU is still at work on that.
        """
        ...

    def account(self, wire_bytes: int) -> None:
        """Take note of what one of the layer's segments took.

        Args:
            wire_bytes: header, tier map and body.
        """
        ...


@dataclass(frozen=True)
class Int4Layers:
    """The layers of a model that may be sent at INT4: all but some.

    Attributes:
        off: the layers, from 0, that do without.

    Raises:
        InvalidArgumentError: a layer's number is negative.
    """

    off: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.off and min(self.off) < 0:
            raise InvalidArgumentError(f"Int4Layers.off names layer {min(self.off)}; layers are numbered from 0")

    @classmethod
    def in_none(cls, layers: int) -> "Int4Layers":
        """Return all of a model's `layers` layers as ones that do without."""
        return cls(frozenset(range(layers)))

    @property
    def in_all_layers(self) -> bool:
        """Tell whether all layers may use it."""
        return not self.off

    @property
    def off_list(self) -> str:
        """List the layers that do without, for people: "0, 3, 29"."""
        return ", ".join(map(str, sorted(self.off)))

    def allows(self, layer: int) -> bool:
        """Return whether a layer, from 0, may use it."""
        return layer not in self.off

    def layer_budget(self, layer: int, tier_budget: float, layers: int) -> float:
        """Share a tier budget out to one layer.

        A layer without INT4 would have to drop tokens below a budget of ½. It is sent at INT8 instead, and the others
        pay for that, as long as INT4 remains affordable to them; beyond that all have the same budget.

        Args:
            layer: from 0.
            tier_budget: mean over all layers.
            layers: of the model.

        Returns:
            The layer's tier budget.
        """
        if tier_budget >= Tier.INT8.nominal_cost or not 0 < len(self.off) <= most_without_int4(tier_budget, layers):
            return tier_budget
        if not self.allows(layer):
            return Tier.INT8.nominal_cost
        left = (tier_budget * layers - Tier.INT8.nominal_cost * len(self.off)) / (layers - len(self.off))
        return max(left, Tier.INT4.nominal_cost)


def most_without_int4(tier_budget: float, layers: int) -> int:
    """Return how many of `layers` layers can be sent at INT8 while the others keep to INT4 on a mean budget."""
    int4, int8 = Tier.INT4.nominal_cost, Tier.INT8.nominal_cost
    return min(layers, max(0, whole_tokens((tier_budget - int4) * layers / (int8 - int4))))


@dataclass(frozen=True)
class PolicyTiers:
    """A `TierAllocation` that gives tokens the tiers of a policy, by their scores.

    Attributes:
        policy: gives tokens their tiers.
        tier_budget: mean tier cost per token, in the policy's range.
        scorer: name of the scorer.
        int4: layers that may be sent at INT4, for policies that heed it.
        seed: for scorers and policies that draw.
        layers: of the model.
    """

    policy: Policy
    tier_budget: float
    scorer: str
    int4: Int4Layers
    seed: int
    layers: int

    def tiers(self, capture: LayerCapture) -> torch.Tensor | RankedTiers:
        """Give one layer's tokens tiers by that layer's own scores.

        Args:
            capture: the layer.

        Returns:
            See `TierAllocation.tiers`.
        """
        layer, budget = capture.layer, self.tier_budget
        if self.policy.heeds_int4:
            budget = self.int4.layer_budget(layer, budget, self.layers)
        # A policy that draws must not draw the same tokens in every layer.
        request = TierRequest(self._scores(capture), budget, self.int4.allows(layer), self.seed + layer)
        if not request.scores.is_cuda:
            return self.policy.assign(request)
        tiers = self.policy.allot(request)
        return RankedTiers(request.scores, tiers) if isinstance(tiers, TierRanks) else tiers

    def tiers_in_all_layers(self, captures: Sequence[LayerCapture]) -> torch.Tensor:
        """Give tokens one tier each in all layers.

        Args:
            captures: all layers.

        Returns:
            uint8 `[n]` on the CPU.
        """
        scores = combine([self._scores(layer) for layer in captures])
        # A token has one tier in all layers, so that one layer without INT4 keeps it from all.
        return self.policy.assign(TierRequest(scores, self.tier_budget, self.int4.in_all_layers, self.seed))

    def account(self, wire_bytes: int) -> None:
        """Do nothing: what segments take changes no tier.

        Args:
            wire_bytes: not looked at.
        """

    def _scores(self, capture: LayerCapture) -> torch.Tensor:
        """Return the scores of one layer's tokens, float32 `[n]`; zeros where the policy does not look at them."""
        if not self.policy.needs_scores:
            return torch.zeros(capture.keys.shape[1])
        return scorers.get(self.scorer)(capture, self.seed)
