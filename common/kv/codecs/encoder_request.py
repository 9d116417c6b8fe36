"""What a codec is told of one prompt: how it is to be encoded, and what that may cost."""

from dataclasses import dataclass

from spectrumkv.common.errors import InternalError, InvalidArgumentError
from spectrumkv.common.kv.allocation import Int4Layers
from spectrumkv.common.kv.budget import Budget, BudgetKind
from spectrumkv.common.kv.codecs.basis import Basis
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.policies.base import Policy


@dataclass(frozen=True)
class EncoderRequest:
    """One prompt and how to encode it.

    Attributes:
        policy: gives tokens their tiers, or leaves them to the codec.
        budget: what may be spent, of the policy's kind.
        scorer: name of the scorer that ranks tokens.
        scope: "layer" for tiers by each layer's scores, "model" for one tier per token in all layers.
        int4: layers that may be sent at INT4, for policies that heed it.
        seed: of the request, for scorers and policies that draw.
        geometry: shape and dtype of the model's cache.
        tokens: of the prompt.
        framing_bytes: what the messages take besides the segments; a byte budget pays for it.
        basis: the model's, for codecs that need one; None where there is none.

    Raises:
        InvalidArgumentError: the seed is negative.
        InternalError: the budget is not of the policy's kind.
    """

    policy: Policy
    budget: Budget
    scorer: str
    scope: str
    int4: Int4Layers
    seed: int
    geometry: KvGeometry
    tokens: int
    framing_bytes: int = 0
    basis: Basis | None = None

    def __post_init__(self) -> None:
        kind = self.policy.budget_kind
        if self.budget.kind is not kind:
            raise InternalError(
                f"policy {self.policy.name!r} has budgets of kind {kind.value!r}, not {self.budget.kind.value!r}"
            )
        if self.seed < 0:
            raise InvalidArgumentError(f"seed is {self.seed}; it must not be negative")

    @property
    def segment_bytes(self) -> int:
        """Compute the bytes that all segments may take, headers and tier maps included.

        Raises:
            InternalError: the budget does not count bytes.
        """
        if self.budget.kind is not BudgetKind.BYTES:
            raise InternalError(f"the budget of policy {self.policy.name!r} does not count bytes")
        return int(self.budget.value * self.geometry.fp16_bytes(self.tokens)) - self.framing_bytes
