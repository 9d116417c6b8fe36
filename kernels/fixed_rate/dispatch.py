"""Segments to records and back, step by step, on a CPU; what a GPU does of it all at once is called from `triton`.

Encoding calls `analyse`, `moments` and `pack`; what happens between them is small, and is the caller's: gains of the
tokens, standard deviations of the rows, and the base step. Decoding is `synthesise`.
"""

import torch

from spectrumkv.kernels.fixed_rate.layout import RecordLayout, RowScales
from spectrumkv.kernels.fixed_rate.operands import Records, TokenTransform


def analyse(
    keys: torch.Tensor, values: torch.Tensor, transform: TokenTransform, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Transform keys and values to coefficients.

    Args:
        keys: `[kv_heads, n, d]`, any float dtype and strides, after the rotary embedding.
        values: like `keys`.
        transform: with the analysis matrices.
        scale: float32 `[rows]`, what the energies multiply coefficients with.

    Returns:
        float32 `[n, rows]`, the coefficients, rows in the order side, head, element; and float32 `[n]`, the sum of
        the squares of each token's scaled coefficients, which is infinite or NaN where an element is.
    """
    from spectrumkv.kernels.fixed_rate import cpu

    return cpu.analyse(keys, values, transform, scale)


def moments(coefficients: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Add up coefficients and their squares over the tokens.

    Args:
        coefficients: float32 `[n, rows]`.
        weights: float32 `[n]`.

    Returns:
        float64 `[rows]` twice: the weighted sums of the coefficients, and of their squares.
    """
    from spectrumkv.kernels.fixed_rate import cpu

    return cpu.moments(coefficients, weights)


def pack(
    coefficients: torch.Tensor, scales: RowScales, tokens: torch.Tensor, layout: RecordLayout, limits: torch.Tensor
) -> Records:
    """Quantize coefficients; the same ones make the same bytes in every implementation.

    Args:
        coefficients: float32 `[n, rows]`, finite.
        scales: of the rows.
        tokens: uint8 `[n]`; see `layout.token_bytes`.
        layout: of the records.
        limits: float32 `[2 · PROFILES, groups]`; see `quantizer.escape_limits`.

    Returns:
        The records, on the CPU.
    """
    from spectrumkv.kernels.fixed_rate import cpu

    return cpu.pack(coefficients, scales, tokens, layout, limits)


def synthesise(
    records: Records,
    scales: RowScales,
    tokens: torch.Tensor,
    layout: RecordLayout,
    transform: TokenTransform,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """Write the keys and values of a segment: the inverse of `analyse` and `pack`, up to quantization.

    Args:
        records: of the segment; the length of `words` is what the layout says, and indices of escapes rise and lie in
            the segment.
        scales: of the rows.
        tokens: uint8 `[n]`.
        layout: of the records.
        transform: with the synthesis matrices.
        keys: `[kv_heads, n, d]`, any float dtype, strides and device; written, after the rotary embedding.
        values: like `keys`.
    """
    from spectrumkv.kernels.fixed_rate import cpu

    cpu.synthesise(records, scales, tokens, layout, transform, keys, values)
