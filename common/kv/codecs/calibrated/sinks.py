"""The first tokens of a prompt, the sinks, which bodies have in the 16-bit dtype: keys of all heads, then values."""

import numpy as np
import torch

from spectrumkv.common.errors import InvalidArgumentError, NotFiniteError
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.kernels.absmax import halves_are_finite


def code_sinks(keys: torch.Tensor, values: torch.Tensor, layer: int, geometry: KvGeometry) -> np.ndarray:
    """Code sinks.

    Args:
        keys: `[kv_heads, sinks, head_dim]`, any float dtype, strides and device.
        values: like `keys`.
        layer: that they are of, from 0.
        geometry: shape and dtype of the model's cache.

    Returns:
        uint8 `[b]`.

    Raises:
        NotFiniteError: an element is infinite or NaN.
        InvalidArgumentError: an element does not fit the 16-bit dtype.
    """
    states = torch.stack([keys, values]).cpu()
    coded = states.to(geometry.half_dtype).view(-1).view(torch.uint8)
    if not halves_are_finite(coded, geometry.half_dtype):
        kind = InvalidArgumentError if bool(states.isfinite().all()) else NotFiniteError
        raise kind(f"keys or values of the first tokens in layer {layer} do not fit {geometry.half_dtype}")
    found: np.ndarray = coded.numpy()
    return found


def write_sinks(coded: np.ndarray, geometry: KvGeometry, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Write sinks: the inverse of `code_sinks`.

    Args:
        coded: uint8 `[b]`, at any address.
        geometry: shape and dtype of the model's cache.
        keys: `[kv_heads, sinks, head_dim]` in the model's own dtype, any strides, on any device; written.
        values: like `keys`.
    """
    states = torch.from_numpy(coded.copy()).view(geometry.half_dtype).view(2, *keys.shape)
    keys[:], values[:] = states[0], states[1]
