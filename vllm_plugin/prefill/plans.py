"""Says how a prompt is coded: as it is asked for, or exactly where that cannot be done."""

from dataclasses import dataclass

from spectrumkv.common.errors import InvalidArgumentError, SpectrumKVError
from spectrumkv.common.kv.allocation import Int4Layers
from spectrumkv.common.kv.codecs.base import codecs, needed_basis
from spectrumkv.common.kv.codecs.basis import Basis
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.plan import CodingPlan
from spectrumkv.common.kv.policies import policies
from spectrumkv.common.kv.scoring import scorers
from spectrumkv.vllm_plugin.options import ConnectorOptions

EXACT = "native"
TIER_CODEC = "absmax"
# One seed for all prompts: equal prompts get equal KV, which a prefix cache may share.
SEED = 0


@dataclass(frozen=True)
class Planner:
    """Makes plans by the connector's options.

    Attributes:
        options: of the connector.
        geometry: of the KV heads of this rank.
        basis: of the same heads; None where none was found.
    """

    options: ConnectorOptions
    geometry: KvGeometry
    basis: Basis | None

    def check(self) -> None:
        """Refuse options that no prompt could use.

        Raises:
            SpectrumKVError: the policy or the scorer is unknown, the budget is out of its range, or the codec needs a
                basis and there is none.
        """
        self._plan(self.options.policy, self.options.budget)

    def plan(self, policy: str, budget: float, tokens: int, framing_bytes: int) -> tuple[CodingPlan, str]:
        """Return how a prompt is coded.

        Args:
            policy: that is asked for.
            budget: of the policy's kind.
            tokens: of the prompt.
            framing_bytes: what messages take besides the segments.

        Returns:
            The plan, and why it is the exact one though another was asked for; nothing where it is as asked for.
        """
        try:
            plan = self._plan(policy, budget)
            if plan.drops_tokens(self.geometry, tokens):
                # vLLM attends to every token of a prompt, so that one that was not sent would count as zeros.
                return self.exact, "drops_tokens"
            plan.encoder(self.geometry, tokens, framing_bytes)
        except SpectrumKVError as error:
            return self.exact, error.code.lower()
        return plan, ""

    @property
    def exact(self) -> CodingPlan:
        """Return the plan that sends the model's own numbers."""
        return self._plan(EXACT, 1.0)

    def _plan(self, policy: str, budget: float) -> CodingPlan:
        chosen = policies.get(policy)
        codec = codecs.get(chosen.codec or TIER_CODEC)
        scorers.get(self.options.scorer)
        if codec.needs_basis:
            needed_basis(codec, self.basis)
        if not 0 < budget <= 1:
            raise InvalidArgumentError(f"budget is {budget}; allowed: above 0 and at most 1")
        int4 = Int4Layers() if self.options.int4 == "on" else Int4Layers.in_none(self.geometry.layers)
        return CodingPlan(chosen, chosen.budget(budget), self.options.scorer, codec, "layer", int4, SEED, self.basis)
