"""The compiled loops of `transform` and `records`, called with tensors; see `dispatch` for what each does."""

import numpy as np
import torch

from spectrumkv.kernels.fixed_rate import records as loops
from spectrumkv.kernels.fixed_rate import transform as transforms
from spectrumkv.kernels.fixed_rate.layout import RecordLayout, RowScales, gain_of_byte
from spectrumkv.kernels.fixed_rate.operands import Records, TokenTransform
from spectrumkv.kernels.fixed_rate.quantizer import quantizers
from spectrumkv.kernels.jit.strided import adjacent, flat, padded_matrices, written_rows

_GAINS, _INVERSE_GAINS = gain_of_byte(1), gain_of_byte(-1)


def analyse(
    keys: torch.Tensor, values: torch.Tensor, transform: TokenTransform, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Transform keys and values to coefficients; see `dispatch.analyse`.

    Returns:
        Coefficients and energies.
    """
    tokens = keys.shape[1]
    coefficients, energy = torch.empty(tokens, scale.numel()), torch.empty(tokens)
    transforms.analyse(
        flat(adjacent(keys.cpu().float())),
        flat(adjacent(values.cpu().float())),
        np.arange(tokens),
        _rotation(transform, 1 / transform.scaling),
        transform.mean.flatten(0, 1).numpy(),
        padded_matrices(transform.matrices),
        scale.numpy(),
        coefficients.numpy(),
        energy.numpy(),
    )
    return coefficients, energy


def moments(coefficients: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Add up coefficients and their squares over the tokens; see `dispatch.moments`.

    Returns:
        The sums of both.
    """
    sums, squares = torch.empty(2, coefficients.shape[1], dtype=torch.float64)
    transforms.moments(coefficients.numpy(), weights.numpy(), sums.numpy(), squares.numpy())
    return sums, squares


def pack(
    coefficients: torch.Tensor, scales: RowScales, tokens: torch.Tensor, layout: RecordLayout, limits: torch.Tensor
) -> Records:
    """Quantize coefficients; see `dispatch.pack`.

    Returns:
        The records.
    """
    order, table = scales.order, quantizers()
    words = np.empty(layout.words, np.uint32)
    # Memory that is not written to is not taken.
    index, value = np.empty(coefficients.numel(), np.uint32), np.empty(coefficients.numel(), np.float32)
    found = loops.pack(
        coefficients.numpy(),
        order.view(np.uint64),
        (scales.mean[order], scales.inverse_std[order], _INVERSE_GAINS),
        tokens.numpy(),
        (layout.widths, layout.profiles, layout.starts),
        limits.numpy(),
        (table.offset, table.slope, table.level),
        words,
        index,
        value,
    )
    word_bytes, index_bytes = (torch.from_numpy(one.view(np.uint8)) for one in (words, index[:found].copy()))
    return Records(word_bytes, index_bytes, torch.from_numpy(value[:found].copy()))


def synthesise(
    records: Records,
    scales: RowScales,
    tokens: torch.Tensor,
    layout: RecordLayout,
    transform: TokenTransform,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """Write the keys and values of a segment; see `dispatch.synthesise`."""
    order = scales.order
    with written_rows(keys) as key_rows, written_rows(values) as value_rows:
        transforms.synthesise(
            _words(records.words),
            _words(records.escape_index),
            records.escape_value.numpy(),
            (layout.widths, layout.profiles, layout.starts),
            (order.view(np.uint64), scales.mean[order], scales.std[order], _GAINS, quantizers().level),
            tokens.numpy(),
            np.arange(keys.shape[1]),
            _rotation(transform, transform.scaling),
            transform.mean.flatten(0, 1).numpy(),
            padded_matrices(transform.matrices),
            flat(key_rows),
            flat(value_rows),
        )


def _words(data: torch.Tensor) -> np.ndarray:
    """Return a copy of bytes as words: what arrives lies at any address, and compiled loops want whole words."""
    words = np.empty(data.numel() // 4, np.uint32)
    words.view(np.uint8)[:] = data.numpy()
    return words


def _rotation(transform: TokenTransform, scaling: float) -> tuple[np.ndarray, np.ndarray, np.float32]:
    return transform.cosine.numpy(), transform.sine.numpy(), np.float32(scaling)
