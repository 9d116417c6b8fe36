"""Who decides the tiers of a prompt's tokens: the interface, and the decision by a policy and its scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.kv.policies.base import Int4Layers, Policy, TierRequest
from spectrumkv.common.kv.scoring import combine, scorers


class TierAllocation(Protocol):
    """Decide the tiers of one prompt's tokens, layer by layer."""

    def tiers(self, capture: LayerCapture) -> torch.Tensor:
        """Give the tokens of the next layer their tiers.

        Args:
            capture: the layer.

        Returns:
            uint8 `[n]` on the CPU, `Tier` values.
        """
        ...

    def account(self, wire_bytes: int) -> None:
        """Take note of what one of the layer's segments took.

        Args:
            wire_bytes: header, tier map and body.
        """
        ...


@dataclass(frozen=True)
class PolicyTiers:
    """Give tokens the tiers of a policy, by their scores. A `TierAllocation`.

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

    def tiers(self, capture: LayerCapture) -> torch.Tensor:
        """Give one layer's tokens tiers by that layer's own scores.

        Args:
            capture: the layer.

        Returns:
            uint8 `[n]` on the CPU.
        """
        layer, budget = capture.layer, self.tier_budget
        if self.policy.heeds_int4:
            budget = self.int4.layer_budget(layer, budget, self.layers)
        # A policy that draws must not draw the same tokens in every layer.
        request = TierRequest(self._scores(capture), budget, self.int4.allows(layer), self.seed + layer)
        return self.policy.assign(request)

    def tiers_in_all_layers(self, captures: Sequence[LayerCapture]) -> torch.Tensor:
        """Give tokens one tier each in all layers.

        Args:
            captures: all layers.

        Returns:
            uint8 `[n]` on the CPU.
        """
        scores = combine([self._scores(layer) for layer in captures])
        # A token has one tier in all layers, so that one layer without INT4 keeps it from all.
        return self.policy.assign(TierRequest(scores, self.tier_budget, self.int4.everywhere, self.seed))

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
