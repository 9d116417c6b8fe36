"""What a request may spend on its KV: a number relative to FP16, and what that number counts.

What was spent in the end has other names, `budget_counted` (bytes) and `budget_nominal` (tier cost), since a request
has one budget and every answer has both.

Command lines read this module, too, so it does without torch, which takes seconds to load.
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


@dataclass(frozen=True)
class BytePolicy:
    """What a request may ask for of a policy whose budget counts bytes; its codec spends them, without a rule.

    Attributes:
        name: as requests give it.
        codec: name of the codec.
        min_budget: least budget that the codec can keep to.
    """

    name: str
    codec: str
    min_budget: float


# All of them. The registry of policies takes them from here.
BYTE_POLICIES = (BytePolicy("spectral", codec="spectral", min_budget=0.05),)
# For help texts: what a number means that names no policy.
BUDGET_MEANING = (
    f"policy {' or '.join(one.name for one in BYTE_POLICIES)} counts all bytes sent, framing included; "
    "other policies count the mean cost per token, without scales and framing"
)


def budget_kind(policy: str) -> BudgetKind:
    """Return what the budget of a policy counts.

    Args:
        policy: its name.
    """
    return BudgetKind.BYTES if policy in {one.name for one in BYTE_POLICIES} else BudgetKind.TIER_COST
