"""All policies by name: importing this module registers them."""

from spectrumkv.common.kv.codecs.spectral import codec as spectral_codec
from spectrumkv.common.kv.policies import baselines as baseline_policies
from spectrumkv.common.kv.policies import paper as paper_policies
from spectrumkv.common.kv.policies.base import Policy, TierRequest, policies

__all__ = ["Policy", "TierRequest", "baseline_policies", "paper_policies", "policies", "spectral_codec"]
