"""Attention that tokens receive: the one place that picks an implementation by device."""

import torch

from spectrumkv.kernels.attention_scores import reference


def accumulated_attention(
    queries: torch.Tensor, keys: torch.Tensor, window: int, sliding_window: int | None, softcap: float | None
) -> torch.Tensor:
    """Sum the softmax weights that each token gets over the last queries of a prompt.

    Observing the last queries only is SnapKV's idea (arXiv 2404.14469, section 4). Query i of a head stands at
    position n − w + i and sees no later token.

    Args:
        queries: float32 `[kv_heads, g · w, head_dim]`, already multiplied by the attention's scaling: for each of the
            g query heads of a KV head those of the last w positions, in order.
        keys: any float dtype `[kv_heads, n, head_dim]`, any strides, on the same device.
        window: w, 1 ≤ w ≤ n.
        sliding_window: how many of the newest tokens a query sees, its own included; None is all of them.
        softcap: bound c of the logits, which become c · tanh(logits / c); None is no bound.

    Returns:
        float32 `[kv_heads, n]`: for each token the sum of the attention weights that the queries give it. Somewhere
        it is NaN where a query or a key is not finite.
    """
    if keys.is_cuda:
        return reference.accumulated_attention(queries, keys, window, sliding_window, softcap)
    # numba takes a third of a second to import.
    from spectrumkv.kernels.attention_scores import cpu

    return cpu.accumulated_attention(queries, keys, window, sliding_window, softcap)


def prepare() -> None:
    """Compile what runs on CPUs, or load it from the cache, so that no request waits for it."""
    from spectrumkv.kernels.attention_scores import cpu

    cpu.prepare()
