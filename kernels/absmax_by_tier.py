"""A block coded tier by tier, out of any implementation of `quantize` and `dequantize`."""

from collections.abc import Callable

import torch

from spectrumkv.kernels.absmax_format import INT4, INT8, TIER_16BIT, TIER_INT4, TIER_INT8, CodeFormat, Parts

FORMATS = {TIER_INT4: INT4, TIER_INT8: INT8}
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, CodeFormat], None]


def encode(
    quantize: Kernel, keys: torch.Tensor, values: torch.Tensor, tiers: torch.Tensor, body: torch.Tensor
) -> None:
    """See `spectrumkv.kernels.absmax.encode`; `quantize` is the implementation to use."""
    parts, index = _parts(body, tiers, keys), token_index(tiers, keys.device)
    for side, states in enumerate((keys, values)):
        parts.fp16[side].copy_(states.index_select(1, index[TIER_16BIT]))
        for tier, form in FORMATS.items():
            codes, scales = parts.coded(form)
            quantize(states, index[tier], codes[side], scales[side], form)


def decode(
    dequantize: Kernel, body: torch.Tensor, tiers: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> None:
    """See `spectrumkv.kernels.absmax.decode`; `dequantize` is the implementation to use."""
    parts, index = _parts(body, tiers, keys), token_index(tiers, keys.device)
    for side, states in enumerate((keys, values)):
        states.index_copy_(1, index[TIER_16BIT], parts.fp16[side].to(states.dtype))
        for tier, form in FORMATS.items():
            codes, scales = parts.coded(form)
            dequantize(codes[side], scales[side], index[tier], states, form)


def _parts(body: torch.Tensor, tiers: torch.Tensor, states: torch.Tensor) -> Parts:
    kv_heads, _, head_dim = states.shape
    half = torch.float16 if states.dtype == torch.float32 else states.dtype
    return Parts.of(body, tiers, kv_heads, head_dim, half)


def token_index(tiers: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Positions of each tier's tokens in a block, ascending, by tier.

    Args:
        tiers: uint8 `[n]` on the CPU, values 0 to 3.
        device: where the positions are wanted; one transfer for all of them.
    """
    counts = torch.bincount(tiers, minlength=TIER_16BIT + 1).tolist()
    return torch.split(torch.argsort(tiers, stable=True).to(device), counts)
