"""How the KV of one prompt is scored, tiered and coded: what a codec's two halves are made from.

Nothing here knows of requests, services or their options: the prefill service completes a plan from a request
(`prefill_server/transfer/plan.py`), and the connector for vLLM from its own options.
"""

from dataclasses import dataclass

import torch

from spectrumkv.common.errors import InvalidArgumentError, quoted
from spectrumkv.common.kv.allocation import Int4Layers
from spectrumkv.common.kv.budget import Budget, BudgetKind
from spectrumkv.common.kv.codecs.base import Codec, KvEncoder, SegmentDecoder
from spectrumkv.common.kv.codecs.basis import Basis
from spectrumkv.common.kv.codecs.encoder_request import EncoderRequest
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.policies.base import Policy, TierRequest
from spectrumkv.common.kv.tiers import Tier

SCOPES = ("layer", "model")


@dataclass(frozen=True)
class CodingPlan:
    """The way in which one prompt's KV is scored, tiered and coded.

    Attributes:
        policy: gives tokens their tiers.
        budget: what may be spent, of the policy's kind and in its range.
        scorer: name of the scorer.
        codec: writes the policy.
        scope: "layer" for tiers by each layer's scores, "model" for one tier per token in all layers.
        int4: layers that may be sent at INT4.
        seed: for scorers and policies that draw.
        basis: the model's, for codecs that need one; None where there is none.
    """

    policy: Policy
    budget: Budget
    scorer: str
    codec: Codec
    scope: str
    int4: Int4Layers
    seed: int
    basis: Basis | None = None

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise InvalidArgumentError(f"unknown scope {quoted(self.scope)}; allowed: {', '.join(SCOPES)}")
        if self.policy.budget_kind is BudgetKind.BYTES and self.scope == "model":
            raise InvalidArgumentError(
                f"policy {self.policy.name!r} codes each layer by its own scores; scope 'model' is for other policies"
            )

    @property
    def streams_chunks(self) -> bool:
        """Tell whether tokens can leave before the rest of their prompt is computed."""
        return self.policy.token_by_token and self.scope == "layer"

    def drops_tokens(self, geometry: KvGeometry, tokens: int) -> bool:
        """Tell whether some token of a prompt would be dropped in some layer.

        The receiver must then mask such tokens, which not every engine can.

        Args:
            geometry: shape and dtype of the model's cache.
            tokens: of the prompt.

        Returns:
            True where at least one is.
        """
        if self.policy.rule is None:
            return False
        # Policies use nothing of scores but their order, so that any scores tell.
        scores = torch.arange(tokens, dtype=torch.float32)
        for allowed, budget in set(self._int4_cases(geometry.layers)):
            tiers = self.policy.assign(TierRequest(scores, budget, allowed, self.seed))
            if bool((tiers == Tier.DROP).any()):
                return True
        return False

    def _int4_cases(self, layers: int) -> list[tuple[bool, float]]:
        """Return for each layer whether it may use INT4, and its tier budget."""
        budget = self.budget.value
        if not self.policy.heeds_int4 or self.scope == "model":
            return [(self.int4.in_all_layers, budget)]
        return [(self.int4.allows(one), self.int4.layer_budget(one, budget, layers)) for one in range(layers)]

    def encoder(self, geometry: KvGeometry, tokens: int, framing_bytes: int) -> KvEncoder:
        """Make what codes a prompt's layers.

        Args:
            geometry: shape and dtype of the model's cache.
            tokens: of the prompt.
            framing_bytes: what the messages take besides the segments; a byte budget pays for it.

        Returns:
            The encoder.

        Raises:
            InvalidArgumentError: the codec cannot keep to the budget.
        """
        return self.codec.encoder(
            EncoderRequest(
                policy=self.policy,
                budget=self.budget,
                scorer=self.scorer,
                scope=self.scope,
                int4=self.int4,
                seed=self.seed,
                geometry=geometry,
                tokens=tokens,
                framing_bytes=framing_bytes,
                basis=self.basis,
            )
        )

    def decoder(self, geometry: KvGeometry) -> SegmentDecoder:
        """Return what decodes this plan's segments, as a decode worker would.

        Args:
            geometry: shape and dtype of the model's cache.
        """
        return self.codec.decoder(geometry, self.basis)
