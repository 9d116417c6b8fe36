"""How much attention each token receives from the prompt's last queries: what importance scores are made of."""

from spectrumkv.kernels.attention_scores.dispatch import mean_attention, prepare

# Shares of the attention below this one are all alike to codecs.
LEAST_SHARE = 1e-7

__all__ = ["LEAST_SHARE", "mean_attention", "prepare"]
