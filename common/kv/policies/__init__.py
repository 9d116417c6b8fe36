"""Policies: which precision each token deserves, given a budget. Each module here registers what it defines."""

from spectrumkv.common.kv.policies.base import BudgetKind, Int4Layers, Policy, TierRequest, policies
from spectrumkv.common.registry import import_modules

import_modules(__name__, __path__)

__all__ = ["BudgetKind", "Int4Layers", "Policy", "TierRequest", "policies"]
