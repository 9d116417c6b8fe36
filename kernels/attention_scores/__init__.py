"""How much attention each token receives from the prompt's last queries: what importance scores are made of."""

from spectrumkv.kernels.attention_scores.dispatch import mean_attention, prepare

__all__ = ["mean_attention", "prepare"]
