"""Policies whose budgets count bytes: each one's codec spends them.

There is nothing here but what a request may ask for; the module of the codec says how it decides.
"""

from spectrumkv.common.kv.budget import BYTE_POLICIES
from spectrumkv.common.kv.policies.base import Policy, policies

for one in BYTE_POLICIES:
    policies.register(one.name)(
        Policy(one.name, one.min_budget, max_budget=1.0, codec=one.codec, needs_scores=True, rule=None)
    )
