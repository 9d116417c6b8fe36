"""Absmax quantization in plain torch: what runs on a CPU, and what the Triton kernels must agree with."""

import torch

from spectrumkv.kernels.absmax_format import INT8, CodeFormat, check_arguments


def quantize(
    states: torch.Tensor, index: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, form: CodeFormat
) -> None:
    """See `spectrumkv.kernels.absmax.quantize`."""
    check_arguments(states, index, codes, scales, form)
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
    """See `spectrumkv.kernels.absmax.dequantize`."""
    check_arguments(states, index, codes, scales, form)
    if not codes.numel():
        return
    rows = (codes if form == INT8 else _unpack(codes)).float()
    rows.mul_(scales.float().unsqueeze(-1))
    if states.dtype == torch.float16:
        largest = torch.finfo(torch.float16).max
        rows.clamp_(-largest, largest)
    states.index_copy_(1, index, rows.to(states.dtype))


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """Pack int8 `[..., d]` in -7 … 7 to uint8 `[..., d / 2]`: element j low, element j + d/2 high."""
    low, high = codes.chunk(2, dim=-1)
    return ((low & 0xF) | (high << 4)).view(torch.uint8)


def _unpack(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of `_pack`; right shifts of int8 extend the sign."""
    signed = packed.view(torch.int8)
    return torch.cat(((signed << 4) >> 4, signed >> 4), dim=-1)
