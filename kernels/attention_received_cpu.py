"""Attention that tokens receive, on CPUs: a matrix product for each KV head, then one compiled pass over its logits.

Softmax, mask and sum over queries take three loops over a row while it is in the first-level cache, where torch's
operations each go through all rows. Nothing is masked: a row's loops run over what its query sees.
"""

import torch

from spectrumkv.kernels.attention_loops import add_weights


def attention_received(
    queries: torch.Tensor, keys: torch.Tensor, window: int, sliding_window: int | None, softcap: float | None
) -> torch.Tensor:
    """See `spectrumkv.kernels.attention_received`."""
    kv_heads, tokens, _ = keys.shape
    received = torch.zeros(kv_heads, tokens)
    logits = torch.empty(queries.shape[1], tokens)
    for head in range(kv_heads):
        torch.mm(queries[head], keys[head].float().t(), out=logits)
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap)
        add_weights(logits.numpy(), window, min(sliding_window or tokens, tokens), received[head].numpy())
    return received


def prepare() -> None:
    """Compile, or load what an earlier process compiled."""
    attention_received(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), 1, None, None)
