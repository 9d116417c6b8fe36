"""All policies by name: importing this module registers them."""

from spectrumkv.common.kv import baseline_policies, paper_policies
from spectrumkv.common.kv.spectral import codec as spectral_codec
from spectrumkv.common.kv.tiering import Policy, TierRequest, policies

__all__ = ["Policy", "TierRequest", "baseline_policies", "paper_policies", "policies", "spectral_codec"]
