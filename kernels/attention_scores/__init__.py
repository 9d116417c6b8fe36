"""How much attention each token receives from the prompt's last queries: what importance scores are made of."""

from spectrumkv.kernels.attention_scores.dispatch import accumulated_attention, prepare

__all__ = ["accumulated_attention", "prepare"]
