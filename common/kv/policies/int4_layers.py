"""Which layers of a model may be sent at INT4."""

from dataclasses import dataclass

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.kv.policies.base import whole_tokens
from spectrumkv.common.kv.tiers import Tier


@dataclass(frozen=True)
class Int4Layers:
    """Where INT4 may be used: in all layers but some.

    Attributes:
        off: the layers, from 0, that do without.

    Raises:
        InvalidArgumentError: a layer's number is negative.
    """

    off: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.off and min(self.off) < 0:
            raise InvalidArgumentError(f"layer {min(self.off)} is to do without INT4; layers count from 0")

    @classmethod
    def nowhere(cls, layers: int) -> "Int4Layers":
        """All of a model's `layers` layers do without."""
        return cls(frozenset(range(layers)))

    @property
    def everywhere(self) -> bool:
        """Whether all layers may use it."""
        return not self.off

    @property
    def off_list(self) -> str:
        """The layers that do without, for people: "0, 3, 29"."""
        return ", ".join(map(str, sorted(self.off)))

    def allows(self, layer: int) -> bool:
        """Whether this layer, from 0, may use it."""
        return layer not in self.off

    def layer_budget(self, layer: int, budget: float, layers: int) -> float:
        """Return what one layer may spend of a mean nominal budget.

        A layer without INT4 would have to drop tokens below a budget of ½. It is sent at INT8 instead, and the others
        pay for that, as long as INT4 remains affordable to them; beyond that all have the same budget.

        Args:
            layer: from 0.
            budget: mean over all layers.
            layers: of the model.
        """
        if budget >= Tier.INT8.nominal_cost or not 0 < len(self.off) <= most_without_int4(budget, layers):
            return budget
        if not self.allows(layer):
            return Tier.INT8.nominal_cost
        left = (budget * layers - Tier.INT8.nominal_cost * len(self.off)) / (layers - len(self.off))
        return max(left, Tier.INT4.nominal_cost)


def most_without_int4(budget: float, layers: int) -> int:
    """Return how many of `layers` layers can be sent at INT8 while the others keep to INT4 on a mean budget."""
    int4, int8 = Tier.INT4.nominal_cost, Tier.INT8.nominal_cost
    return min(layers, max(0, whole_tokens((budget - int4) * layers / (int8 - int4))))
