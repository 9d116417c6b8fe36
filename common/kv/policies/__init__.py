"""Policies: which precision each token deserves, given a budget. Each module here registers what it defines."""

# Before the others, so that the servers' default leads every list of names.
from spectrumkv.common.kv.policies import byte_budgets as byte_budgets
from spectrumkv.common.kv.policies.base import Policy, TierRequest, policies
from spectrumkv.common.registry import import_modules

import_modules(__name__, __path__)

__all__ = ["Policy", "TierRequest", "policies"]
