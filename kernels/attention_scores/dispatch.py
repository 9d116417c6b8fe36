"""How much attention tokens receive from a few queries: the one place that picks an implementation by device.

Args of every implementation:
    queries: float32 `[kv_heads, g · w, head_dim]`, scaled: for each of the `g` query heads of a KV head, those of the
        last `w` positions, in order.
    keys: any float dtype `[kv_heads, n, head_dim]`, any strides.
    window: w, 1 ≤ w ≤ n.
    sliding_window: a query does not see tokens at this distance or farther; None is all of them.
    softcap: bound c of the logits, which become c · tanh(logits / c); None is no bound.
Returns of every implementation:
    float32 `[kv_heads, n]`: for each token the sum of the attention weights that the queries give it. NaN somewhere
    where a query or a key is not finite.
"""

import torch

from spectrumkv.kernels.attention_scores import reference as attention_received_reference


def accumulated_attention(
    queries: torch.Tensor, keys: torch.Tensor, window: int, sliding_window: int | None, softcap: float | None
) -> torch.Tensor:
    """Sum the softmax weights over queries; see the module. Query i of a head stands at position n − w + i."""
    if keys.is_cuda:
        return attention_received_reference.accumulated_attention(queries, keys, window, sliding_window, softcap)
    # numba takes a third of a second to import.
    from spectrumkv.kernels.attention_scores import cpu as attention_received_cpu

    return attention_received_cpu.accumulated_attention(queries, keys, window, sliding_window, softcap)


def prepare() -> None:
    """Compile what runs on CPUs, or load it from the cache, so that no request waits for it."""
    from spectrumkv.kernels.attention_scores import cpu as attention_received_cpu

    attention_received_cpu.prepare()
