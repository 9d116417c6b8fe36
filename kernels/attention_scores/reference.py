"""Attention that tokens receive, in plain torch: what runs on a GPU, and what the CPU's loops must agree with."""

import math

import torch


def accumulated_attention(
    queries: torch.Tensor, keys: torch.Tensor, window: int, sliding_window: int | None, softcap: float | None
) -> torch.Tensor:
    """See `spectrumkv.kernels.accumulated_attention`; takes memory for g · w · n logits of every KV head."""
    tokens = keys.shape[1]
    logits = torch.matmul(queries, keys.to(queries.dtype).transpose(1, 2))
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    positions = torch.arange(tokens, device=keys.device)
    distance = positions[tokens - window :, None] - positions
    seen = distance >= 0
    if sliding_window is not None:
        seen &= distance < sliding_window
    # Every query sees at least itself, so no row is masked entirely.
    logits.view(-1, window, tokens).masked_fill_(~seen, -math.inf)
    return torch.softmax(logits, dim=-1).sum(dim=1)
