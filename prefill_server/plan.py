"""What a request's KV options come to, once the server's defaults and the probe's verdict are in."""

from dataclasses import dataclass

import torch

from spectrumkv.common.config import PrefillConfig
from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.kv.codec import Codec, codecs
from spectrumkv.common.kv.policy import Policy, TierRequest, policies
from spectrumkv.common.kv.scoring import Observation, combine, scorers
from spectrumkv.common.kv.tiers import Tier
from spectrumkv.v1 import prefill_pb2

SCOPES = ("layer", "model")
# What a codec must be able to write for policies that do not name one.
SPECTRUM = frozenset({Tier.DROP, Tier.INT4, Tier.INT8, Tier.FP16})


@dataclass(frozen=True)
class KvPlan:
    """How one request's KV is scored, tiered and coded.

    Attributes:
        policy: gives tokens their tiers.
        budget: mean nominal cost per token, in the policy's range.
        scorer: name of the scorer.
        codec: writes the tiers.
        scope: "layer" for tiers by each layer's scores, "model" for one tier per token in all layers.
        int4_allowed: the probe's verdict.
        seed: for scorers and policies that draw.
    """

    policy: Policy
    budget: float
    scorer: str
    codec: Codec
    scope: str
    int4_allowed: bool
    seed: int

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise InvalidArgumentError(f"unknown scope {self.scope!r}; valid: {', '.join(SCOPES)}")

    @classmethod
    def resolve(
        cls, options: prefill_pb2.KvOptions, config: PrefillConfig, int4_allowed: bool, seed: int
    ) -> "KvPlan":
        """Fill what a request leaves open from the server's configuration.

        Raises:
            InvalidArgumentError: a name is unknown, or the budget is out of the policy's range.
        """
        policy = policies.get(options.policy or config.policy)
        requested = options.budget if options.HasField("budget") else None
        scorer = options.scorer or config.scorer
        scorers.get(scorer)
        codec = codecs.get(options.codec or policy.codec or config.codec)
        if policy.codec not in (None, codec.name):
            raise InvalidArgumentError(
                f"policy {policy.name!r} is written by codec {policy.codec!r}, not by {codec.name!r}"
            )
        if policy.codec is None and not codec.tiers >= SPECTRUM:
            raise InvalidArgumentError(
                f"codec {codec.name!r} cannot write policy {policy.name!r}: "
                f"it only has {', '.join(tier.label for tier in sorted(codec.tiers))}"
            )
        return cls(
            policy=policy,
            budget=policy.resolve_budget(requested, config.budget),
            scorer=scorer,
            codec=codec,
            scope=options.scope or config.scope,
            int4_allowed=int4_allowed,
            seed=seed,
        )

    def tiers_of(self, observation: Observation) -> torch.Tensor:
        """Tiers of one layer's tokens by that layer's own scores: uint8 `[n]` on the CPU."""
        return self._assign(self._score(observation), observation.layer)

    def tiers_for_model(self, observations: list[Observation]) -> torch.Tensor:
        """One tier per token for all layers, by their scores together: uint8 `[n]` on the CPU."""
        return self._assign(combine([self._score(observation) for observation in observations]), layer=0)

    def _score(self, observation: Observation) -> torch.Tensor:
        """Scores of one layer's tokens, float32 `[n]`; zeros where the policy does not look at them."""
        if not self.policy.needs_scores:
            return torch.zeros(observation.keys.shape[1])
        return scorers.get(self.scorer)(observation)

    def _assign(self, scores: torch.Tensor, layer: int) -> torch.Tensor:
        # A policy that draws must not draw the same tokens in every layer.
        return self.policy.assign(TierRequest(scores, self.budget, self.int4_allowed, self.seed + layer))
