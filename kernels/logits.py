"""What every attention does to its logits before the softmax: bound them, and hide tokens that a query does not see.

Attention written in torch calls these functions, in prefill, in decode, in scores and in the benches. Compiled loops
and Triton kernels cannot call them and say the same in their own words: `attention_scores/cpu.py` by the bounds of
its loops, `decode_attention/triton.py` in its kernel.
"""

import torch


def soft_cap(
    logits: torch.Tensor, cap: float, *, scaling: float = 1.0, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Bound attention logits smoothly: c · tanh(x / c) (Gemma 2, arXiv 2408.00118, section 2).

    Args:
        logits: any float dtype and shape.
        cap: c, above 0.
        scaling: factor that the logits still lack. It is folded into the division, which saves a pass over them.
        out: where the result is written, `logits` itself for instance; None is a new tensor, through which gradients
            flow.

    Returns:
        The bounded logits: `out`, or a tensor like `logits`.
    """
    ratio = torch.div(logits, cap, out=out) if scaling == 1.0 else torch.mul(logits, scaling / cap, out=out)
    return torch.mul(torch.tanh(ratio, out=out), cap, out=out)


def causal_mask(positions: range, tokens: int, sliding_window: int | None, device: torch.device) -> torch.Tensor:
    """Say which tokens queries at some positions see: those up to their own, or the newest of these.

    Args:
        positions: of the queries, one after another, all below `tokens`.
        tokens: how many tokens there are, at positions from 0.
        sliding_window: how many of the newest tokens a query sees, its own included; None is all.
        device: where the mask is wanted.

    Returns:
        bool `[len(positions), tokens]`, True where the query of the row sees the token.
    """
    at = torch.arange(positions.start, positions.stop, device=device)
    distance = at[:, None] - torch.arange(tokens, device=device)
    seen = distance >= 0
    return seen if sliding_window is None else seen & (distance < sliding_window)
