"""Name the ways of sending KV that a device check compares. A new one joins by its name in `CONTENDERS`."""

from spectrumkv.client.request import KvChoice
from spectrumkv.common.kv.policies import policies

# Policies, with the codec that writes them after a colon where it is not the policy's own.
CONTENDERS = ("native", "adaptive", "spectral:absmax")
BUDGET = 0.3


def kv_choice(contender: str, budget: float = BUDGET) -> KvChoice:
    """Return what a request asks for.

    Args:
        contender: a policy, optionally with a codec after a colon.
        budget: asked for where the policy leaves a choice of budgets.

    Raises:
        InvalidArgumentError: the policy is unknown.
    """
    name, _, codec = contender.partition(":")
    policy = policies.get(name)
    fixed = policy.min_budget == policy.max_budget
    return KvChoice(policy=name, codec=codec or None, budget=None if fixed else budget)
