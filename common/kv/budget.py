"""What a request may spend on its KV: a number relative to FP16, and what that number counts.

What was spent in the end has other names, `budget_counted` (bytes) and `budget_nominal` (tier cost), since a request
has one budget and every answer has both.
"""

from dataclasses import dataclass
from enum import Enum

from spectrumkv.common.errors import InvalidArgumentError


class BudgetKind(Enum):
    """What a budget counts.

    BYTES: all bytes that are sent ÷ the KV's bytes at FP16.
    TIER_COST: mean cost of the tokens' tiers, scales and framing left out; the SpectrumKV paper's b.
    """

    BYTES = "bytes"
    TIER_COST = "tier_cost"


@dataclass(frozen=True)
class Budget:
    """What one request may spend.

    Attributes:
        kind: what is counted; its policy says it.
        value: relative to FP16.

    Raises:
        InvalidArgumentError: the value is not above 0 and at most 1.
    """

    kind: BudgetKind
    value: float

    def __post_init__(self) -> None:
        if not 0 < self.value <= 1:
            raise InvalidArgumentError(f"a budget is {self.value}; allowed: above 0 and at most 1, which is FP16")
