"""Absmax quantization in plain torch, tier by tier: what the kernels must agree with."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch

from spectrumkv.kernels.absmax.layout import FLOAT16_MAX, FORMATS, INT8, BodySections, CodeFormat, segment_layout
from spectrumkv.kernels.tiers import TIER_16BIT


def quantize(
    states: torch.Tensor, index: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, form: CodeFormat
) -> None:
    """Write the codes and scales of the tokens `index` of one side at one format.

    Args:
        states: `[kv_heads, n, head_dim]`.
        index: int64 `[m]`.
        codes: `[kv_heads, m, code bytes]`, written; see `BodySections`.
        scales: float16 `[kv_heads, m]`, written.
        form: format of the codes.
    """
    if not codes.numel():
        return
    # A copy even where the dtype is float32 already: it is worked on in place.
    rows = states.index_select(1, index).float()
    absmax = rows.abs().amax(dim=-1)
    # Torch multiplies by the reciprocal when it divides a CUDA tensor by a Python number; by a tensor it
    # divides, correctly rounded.
    scales.copy_(absmax / torch.full_like(absmax, form.largest))
    # Dividing by infinity makes the codes of a zero scale zero, without another pass.
    divisor = torch.where(scales > 0, scales.float(), torch.inf)
    rows.div_(divisor.unsqueeze(-1)).round_().clamp_(-form.largest, form.largest)
    if form == INT8:
        codes.copy_(rows)
    else:
        codes.copy_(_pack(rows.to(torch.int8)))


def dequantize(
    codes: torch.Tensor, scales: torch.Tensor, index: torch.Tensor, states: torch.Tensor, form: CodeFormat
) -> None:
    """Undo `quantize`, with the same arguments: write the tokens `index` of `states`, and no others."""
    if not codes.numel():
        return
    rows = (codes if form == INT8 else _unpack(codes)).float()
    rows.mul_(scales.float().unsqueeze(-1))
    if states.dtype == torch.float16:
        rows.clamp_(-FLOAT16_MAX, FLOAT16_MAX)
    states.index_copy_(1, index, rows.to(states.dtype))


def encode(
    keys: torch.Tensor, values: torch.Tensor, tiers: torch.Tensor, boundaries: Sequence[int], bodies: torch.Tensor
) -> None:
    """Code segments of tokens; see `dispatch.encode`."""
    for span, body, index in _segments(keys, tiers, boundaries, bodies):
        for side, states in enumerate((keys[:, span], values[:, span])):
            body.floats[side].copy_(states.index_select(1, index[TIER_16BIT]))
            for tier, form in FORMATS.items():
                codes, scales = body.coded(form)
                quantize(states, index[tier], codes[side], scales[side], form)


def decode(
    bodies: torch.Tensor, tiers: torch.Tensor, boundaries: Sequence[int], keys: torch.Tensor, values: torch.Tensor
) -> None:
    """Write the tokens of segments; see `dispatch.decode`."""
    for span, body, index in _segments(keys, tiers, boundaries, bodies):
        for side, states in enumerate((keys[:, span], values[:, span])):
            states.index_copy_(1, index[TIER_16BIT], body.floats[side].to(states.dtype))
            for tier, form in FORMATS.items():
                codes, scales = body.coded(form)
                dequantize(codes[side], scales[side], index[tier], states, form)


def _segments(
    states: torch.Tensor, tiers: torch.Tensor, boundaries: Sequence[int], bodies: torch.Tensor
) -> Iterator[tuple[slice, BodySections[torch.Tensor], dict[int, torch.Tensor]]]:
    """Yield each segment's tokens, the sections of its body, and the positions in it of each tier's tokens."""
    kv_heads, _, head_dim = states.shape
    half = torch.float16 if states.dtype == torch.float32 else states.dtype
    begin = 0
    for first, end in pairwise(boundaries):
        segment = tiers[first:end]
        layout = segment_layout(segment, kv_heads, head_dim, half)
        body = BodySections(*layout.arrays(bodies[begin : begin + layout.bytes]))
        begin += layout.bytes
        index = {tier: torch.nonzero(segment == tier).flatten().to(states.device) for tier in (*FORMATS, TIER_16BIT)}
        yield slice(first, end), body, index


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """Pack int8 codes `[..., d]` in -7 … 7 into uint8 `[..., d / 2]`: element j low, element j + d/2 high.

    Returns:
        The packed codes.
    """
    low, high = codes.chunk(2, dim=-1)
    return ((low & 0xF) | (high << 4)).view(torch.uint8)


def _unpack(packed: torch.Tensor) -> torch.Tensor:
    """Unpack the codes that `_pack` packed; right shifts of int8 extend the sign.

    Returns:
        int8 `[..., d]`.
    """
    signed = packed.view(torch.int8)
    return torch.cat(((signed << 4) >> 4, signed >> 4), dim=-1)
