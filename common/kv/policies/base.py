"""What a policy is: a budget and the tokens' scores in, one tier per token out.

The other modules of this folder have the policies, one small piece each. Importing the folder imports them all, so
that `policies` is complete wherever it comes from.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from spectrumkv.common.errors import InternalError, InvalidArgumentError
from spectrumkv.common.kv.budget import Budget, BudgetKind, budget_kind
from spectrumkv.common.kv.policies.ranks import check_scores, ranked
from spectrumkv.common.kv.tiers import Tier
from spectrumkv.common.registry import Registry
from spectrumkv.kernels.tier_placement import TierRanks


@dataclass(frozen=True, eq=False)
class TierRequest:
    """A prompt's scores and tier budget, or those of one layer, as a policy sees them.

    Attributes:
        scores: float32 `[n]`, n ≥ 1, on any device: higher is more important. Policies that need no scores only
            look at n. On a GPU they are checked where they are used, since a check would wait for it.
        tier_budget: mean tier cost per token that may be spent, relative to FP16.
        int4_allowed: whether this layer, or with one tier for all layers every layer, can be trusted at INT4 (the
            probe's verdict).
        seed: for policies that draw; 0 or more.

    Raises:
        InvalidArgumentError: the scores are no such tensor, or the seed is negative.
        NotFiniteError: a score is infinite or NaN.
    """

    scores: torch.Tensor
    tier_budget: float
    int4_allowed: bool
    seed: int

    def __post_init__(self) -> None:
        if self.scores.dim() != 1 or not self.scores.numel() or self.scores.dtype != torch.float32:
            raise InvalidArgumentError(
                f"scores are {self.scores.dtype} {list(self.scores.shape)}; wanted are float32 [n] with n at least 1"
            )
        if not self.scores.is_cuda:
            check_scores(self.scores)
        if self.seed < 0:
            raise InvalidArgumentError(f"seed is {self.seed}; it must not be negative")

    @property
    def tokens(self) -> int:
        """Count the tokens, n."""
        return self.scores.numel()


Rule = Callable[[TierRequest], torch.Tensor | TierRanks]
"""Maps a request of n tokens to their tiers, uint8 `[n]` on the CPU, or says which tiers tokens get by their rank. Of
ranks a GPU makes tiers without the host's waiting for scores."""

AnyRule = TypeVar("AnyRule", bound=Rule)


@dataclass(frozen=True)
class Policy:
    """A way to spend a budget on tokens.

    Attributes:
        name: as requests give it.
        min_budget: least budget that the policy can keep to.
        max_budget: largest budget that makes sense.
        codec: name of the codec that the policy belongs to; None leaves the choice to the request.
        needs_scores: whether `assign` looks at the scores' values. If not, they need not be computed.
        rule: what `assign` does once the budget is checked; None where the codec spends the budget itself.
        heeds_int4: whether it looks at `int4_allowed`. To name a policy that does not is to accept INT4.
        token_by_token: whether a token's tier depends on no other token, so that the first ones can leave before the
            last ones are computed.
    """

    name: str
    min_budget: float
    max_budget: float
    codec: str | None
    needs_scores: bool
    rule: Rule | None
    heeds_int4: bool = False
    token_by_token: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.min_budget <= self.max_budget <= 1:
            raise ValueError(
                f"policy {self.name!r}: budgets {self.min_budget} to {self.max_budget} are not in (0, 1]"
            )
        if (self.rule is None) is not (self.budget_kind is BudgetKind.BYTES):
            raise ValueError(
                f"policy {self.name!r}: those without a rule, and no others, are listed in common/kv/budget.py"
            )

    @property
    def budget_kind(self) -> BudgetKind:
        """Tell what the policy's budget counts: bytes where its codec spends them, else the cost of its tiers."""
        return budget_kind(self.name)

    def assign(self, request: TierRequest) -> torch.Tensor:
        """Give the tokens their tiers.

        Args:
            request: scores and budget.

        Returns:
            uint8 `[n]` on the CPU, `Tier` values, at least one token not dropped.

        Raises:
            InvalidArgumentError: the budget is out of this policy's range.
            InternalError: the policy leaves tiers to its codec.
            NotFiniteError: a score on a GPU is infinite or NaN.
        """
        tiers = self.allot(request)
        return ranked(request.scores, tiers) if isinstance(tiers, TierRanks) else tiers

    def allot(self, request: TierRequest) -> torch.Tensor | TierRanks:
        """Say which tiers the tokens get, by their rank where the rule goes by it.

        Args:
            request: scores and budget.

        Returns:
            See `Rule`.

        Raises:
            InvalidArgumentError: the budget is out of this policy's range.
            InternalError: the policy leaves tiers to its codec.
        """
        self.check_budget(request.tier_budget)
        if self.rule is None:
            raise InternalError(f"policy {self.name!r} leaves tiers to codec {self.codec!r}")
        return self.rule(request)

    def check_budget(self, budget: float) -> None:
        """Check a requested budget.

        Args:
            budget: of this policy's kind.

        Raises:
            InvalidArgumentError: it is out of this policy's range or not a number.
        """
        if not self.min_budget <= budget <= self.max_budget:
            fixed = self.min_budget == self.max_budget
            allowed = f"exactly {self.max_budget}" if fixed else f"from {self.min_budget} to {self.max_budget}"
            raise InvalidArgumentError(f"policy {self.name!r} cannot keep to budget {budget}; allowed is {allowed}")

    def budget(self, value: float) -> Budget:
        """Make a budget of this policy's kind.

        Args:
            value: relative to FP16.

        Returns:
            The budget.

        Raises:
            InvalidArgumentError: it is out of this policy's range or not a number.
        """
        self.check_budget(value)
        return Budget(self.budget_kind, value)

    def resolve_budget(self, requested: float | None, server_default: float) -> Budget:
        """Settle the budget of a request.

        A budget that was asked for is kept or refused, never changed. The server's default was not chosen with
        this policy in mind, so it is moved into the policy's range.

        Args:
            requested: of this policy's kind; None where the request names none.
            server_default: of this policy's kind.

        Returns:
            The budget, in this policy's range.

        Raises:
            InvalidArgumentError: the requested budget is out of range.
        """
        if requested is None:
            return self.budget(min(max(server_default, self.min_budget), self.max_budget))
        return self.budget(requested)


policies: Registry[Policy] = Registry("policy")


def policy(
    name: str,
    min_budget: float,
    codec: str | None = None,
    needs_scores: bool = True,
    heeds_int4: bool = False,
    token_by_token: bool = False,
) -> Callable[[AnyRule], AnyRule]:
    """Return a decorator that registers a rule as a policy, whose largest budget is FP16 for every token.

    Args:
        name: see `Policy`, like the others.
        min_budget: a tier budget.
        codec: see `Policy`.
        needs_scores: see `Policy`.
        heeds_int4: see `Policy`.
        token_by_token: see `Policy`.

    Returns:
        The decorator; the rule stays as it is.
    """

    def add(rule: AnyRule) -> AnyRule:
        made = Policy(name, min_budget, Tier.FP16.nominal_cost, codec, needs_scores, rule, heeds_int4, token_by_token)
        policies.register(name)(made)
        return rule

    return add


def whole_tokens(share: float) -> int:
    """Round a number of tokens down, so that rounding never exceeds the budget.

    The slack of 1e-9 tokens keeps numbers that only binary fractions keep from being whole: (4 · 0.3 − 1) · 20 is 4,
    not 3.

    Args:
        share: tokens, 0 or more.

    Returns:
        Whole tokens.
    """
    return math.floor(share + 1e-9)
