"""Absmax quantization of keys and values: picks an implementation by the device that keys and values are on.

On a GPU whole layers are coded (`encode_ranked`, `encode_tiers`), with word of what could not be, so that the host
waits once. `halves_are_finite` looks at bodies that lie in memory of the host.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from spectrumkv.kernels.tier_placement import SegmentRoom, TierRanks

if TYPE_CHECKING:
    from spectrumkv.kernels.absmax.triton import CodedLayer


def encode(
    keys: torch.Tensor, values: torch.Tensor, tiers: torch.Tensor, boundaries: Sequence[int], bodies: torch.Tensor
) -> None:
    """Code segments of tokens, each token at its own tier.

    This is the quantizer of the SpectrumKV paper (arXiv 2606.08635, Method).

    A scale is `max |x| / largest` of a format, rounded to float16, one for a token in a KV head. A code is
    `x / scale` rounded half to even and clamped to ±`largest`, or 0 where the scale is 0. All arithmetic
    is in float32. Elements at 16 bits are rounded half to even.

    The error of a coded element is at most half a scale, or `largest` · 2^-25 (the rounding of a subnormal
    float16 scale, times the greatest code) where that is more: rows below 127 · 2^-14 for INT8.

    A NaN or infinite element, or a scale beyond float16, leaves a scale that is not finite; the codes beside
    it mean nothing. What is too large for float16 becomes infinite at 16 bits. The caller checks that, since a check
    here would wait for the GPU.

    Args:
        keys: float32, float16 or bfloat16 `[kv_heads, n, head_dim]`, n ≥ 1, any strides, head_dim even.
        values: like `keys`, on the same device.
        tiers: uint8 `[n]` on the CPU, codes of the wire's tier map.
        boundaries: the first token of each segment, rising from 0, and n.
        bodies: uint8, contiguous, on the device of the keys, written from end to end: the segments' bodies, one after
            another. `layout.body_layout` says what they have; the length must be theirs.
    """
    if keys.is_cuda:
        from spectrumkv.kernels.absmax import triton

        triton.encode(keys, values, tiers, boundaries, bodies)
    else:
        from spectrumkv.kernels.absmax import cpu

        cpu.encode(keys, values, tiers, boundaries, bodies)


def encode_ranked(
    keys: torch.Tensor, values: torch.Tensor, scores: torch.Tensor, ranks: TierRanks, room: SegmentRoom
) -> "CodedLayer":
    """Code a layer on a GPU at the tiers that its tokens' scores give them, in two launches, without waiting.

    Args:
        keys: on a GPU; see `encode`.
        values: like `keys`.
        scores: float32 `[n]` on the same device.
        ranks: which tiers tokens get.
        room: of a segment.

    Returns:
        The layer, on the device.
    """
    from spectrumkv.kernels.absmax import triton

    return triton.encode_ranked(keys, values, scores, ranks, room)


def encode_tiers(
    keys: torch.Tensor, values: torch.Tensor, tiers: torch.Tensor, boundaries: Sequence[int], body_bytes: int
) -> "CodedLayer":
    """Code a layer on a GPU whose tiers the host knows, in one copy and one launch, without waiting.

    Args:
        keys: on a GPU; see `encode`.
        values: like `keys`.
        tiers: see `encode`.
        boundaries: see `encode`.
        body_bytes: of all segments' bodies.

    Returns:
        The layer, on the device.
    """
    from spectrumkv.kernels.absmax import triton

    return triton.encode_tiers(keys, values, tiers, boundaries, body_bytes)


def decode(
    bodies: torch.Tensor, tiers: torch.Tensor, boundaries: Sequence[int], keys: torch.Tensor, values: torch.Tensor
) -> None:
    """Write every token that `encode` coded, and leave the dropped ones as they are.

    `code × scale` is exact in float32 and rounded half to even to the states' dtype. float16 saturates: the
    scale of a row near 65504 may have been rounded up, and a finite element must not come back infinite.

    Args:
        bodies: on the device of the keys, read; scales must be finite. On a CPU they may lie at an odd address and be
            read-only.
        tiers: uint8 `[n]` on the CPU.
        boundaries: see `encode`.
        keys: float32, float16 or bfloat16 `[kv_heads, n, head_dim]`, any strides, written.
        values: like `keys`, on the same device.
    """
    if keys.is_cuda:
        from spectrumkv.kernels.absmax import triton

        triton.decode(bodies, tiers, boundaries, keys, values)
    else:
        from spectrumkv.kernels.absmax import cpu

        cpu.decode(bodies, tiers, boundaries, keys, values)


def decode_segments(
    bodies: Sequence[torch.Tensor],
    tiers: Sequence[torch.Tensor],
    slots: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> None:
    """Write the tokens of segments of any layers on a GPU, in one copy and one launch, without waiting.

    Args:
        bodies: uint8 on the CPU, one for each segment; see `decode`.
        tiers: uint8 `[n]` on the CPU, for each segment.
        slots: keys and values of each segment, `[kv_heads, n, head_dim]`, views of one cache; written.
    """
    from spectrumkv.kernels.absmax import triton

    triton.decode_segments(bodies, tiers, slots)


def prepare(dtype: torch.dtype) -> None:
    """Compile what runs on CPUs, so that no request waits for it.

    It takes seconds where this machine has not compiled it before, and a fraction of one where code is in the cache.

    Args:
        dtype: of the states that will be coded.
    """
    from spectrumkv.kernels.absmax import cpu

    cpu.prepare(dtype)


def halves_are_finite(data: torch.Tensor, dtype: torch.dtype) -> bool:
    """Return whether no 16-bit float is infinite or NaN, without a copy where they lie at an odd address.

    Args:
        data: uint8 `[2 m]` on the CPU, contiguous, at any address: the bytes of m elements.
        dtype: of the elements, float16 or bfloat16.
    """
    from spectrumkv.kernels.absmax import cpu

    return cpu.halves_are_finite(data, dtype)
