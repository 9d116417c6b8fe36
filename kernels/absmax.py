"""Absmax quantization of keys and values: the one place that picks an implementation by device.

Args of both operations:
    states: float32, float16 or bfloat16 `[kv_heads, n, head_dim]`, any strides; a layer's keys or values.
    index: int64 `[m]`, positions among the `n`, on the same device. Torch refuses positions outside
        on a CPU; on a GPU nothing notices them.
    codes: `form.dtype` `[kv_heads, m, form.code_bytes(head_dim)]`, contiguous. INT4 packs element j of a head
        into the low nibble of byte j and element j + head_dim / 2 into the high one, as two's complement.
    scales: float16 `[kv_heads, m]`, contiguous.
    form: `INT8` or `INT4`.
"""

import torch

from spectrumkv.kernels import absmax_reference
from spectrumkv.kernels.absmax_format import INT4, INT8, CodeFormat

__all__ = ["INT4", "INT8", "CodeFormat", "dequantize", "quantize"]


def quantize(
    states: torch.Tensor, index: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, form: CodeFormat
) -> None:
    """Gather the tokens `index` of `states` and write their codes and scales.

    A scale is `max |x| / form.largest` rounded to float16, one for a token in a KV head. A code is
    `x / scale` rounded half to even and clamped to ±`form.largest`, or 0 where the scale is 0. All arithmetic
    is in float32.

    The error of an element is at most half a scale, or `form.largest` · 2^-25 (the rounding of a subnormal
    float16 scale, times the greatest code) where that is more: rows below 127 · 2^-14 for INT8.

    A NaN or infinite element, or a scale beyond float16, leaves a scale that is not finite; the codes beside
    it mean nothing. It is the caller's to check, since here a GPU would have to be waited for.

    Args:
        states: read; see the module.
        index: read.
        codes: written.
        scales: written.
        form: format of the codes.

    Raises:
        ValueError: a shape, dtype, stride or device is not as described.
    """
    if states.is_cuda:
        # Triton takes a while to import, and exists on Linux only.
        from spectrumkv.kernels import absmax_triton

        absmax_triton.quantize(states, index, codes, scales, form)
    else:
        absmax_reference.quantize(states, index, codes, scales, form)


def dequantize(
    codes: torch.Tensor, scales: torch.Tensor, index: torch.Tensor, states: torch.Tensor, form: CodeFormat
) -> None:
    """Write `code × scale` into the tokens `index` of `states`, and into no others.

    The product is exact in float32 and rounded half to even to the states' dtype. float16 saturates: the
    scale of a row near 65504 may have been rounded up, and a finite element must not come back infinite.

    Args:
        codes: read; see the module.
        scales: read; they must be finite.
        index: read; without repetitions.
        states: written.
        form: format of the codes.

    Raises:
        ValueError: a shape, dtype, stride or device is not as described.
    """
    if states.is_cuda:
        from spectrumkv.kernels import absmax_triton

        absmax_triton.dequantize(codes, scales, index, states, form)
    else:
        absmax_reference.dequantize(codes, scales, index, states, form)
