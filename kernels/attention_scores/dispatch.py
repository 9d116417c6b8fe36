"""Attention that tokens receive: the one place that picks an implementation by device."""

import torch


def mean_attention(
    queries: torch.Tensor, keys: torch.Tensor, scaling: float, sliding_window: int | None, softcap: float | None
) -> torch.Tensor:
    """Average the softmax weights that each token gets from the last queries of a prompt.

    Observing the last queries only is SnapKV's idea (arXiv 2404.14469, section 4). Query i of a head stands at
    position n − w + i and sees no later token. The mean runs over all query heads, and over those queries that can
    see the token, so that few queries do not make the last tokens look unimportant.

    Args:
        queries: any float dtype `[query_heads, w, head_dim]`, 1 ≤ w ≤ n: those of the last w positions, in order.
            Head h reads KV head h // (query_heads / kv_heads).
        keys: in the queries' dtype, `[kv_heads, n, head_dim]`, any strides, on the same device.
        scaling: factor of query · key.
        sliding_window: how many of the newest tokens a query sees, its own included; None is all of them.
        softcap: bound c of the logits, which become c · tanh(logits / c); None is no bound.

    Returns:
        float32 `[n]`, from 0 to 1; 0 where a sliding window hides the token from every query. Some of it is NaN
        where a query or a key is not finite.
    """
    if keys.is_cuda:
        # Triton takes a while to import, and exists on Linux only.
        from spectrumkv.kernels.attention_scores import triton

        return triton.mean_attention(queries, keys, scaling, sliding_window, softcap)
    # numba takes a third of a second to import.
    from spectrumkv.kernels.attention_scores import cpu

    return cpu.mean_attention(queries, keys, scaling, sliding_window, softcap)


def prepare() -> None:
    """Compile what runs on CPUs, or load it from the cache, so that no request waits for it."""
    from spectrumkv.kernels.attention_scores import cpu

    cpu.prepare()
