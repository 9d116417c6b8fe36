"""One layer's keys and values to coefficients and back."""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch

from spectrumkv.common.kv.spectral.basis import SpectralBasis
from spectrumkv.common.kv.spectral.layout import spread_classes
from spectrumkv.kernels import spectral_streams as streams


@dataclass(frozen=True, eq=False)
class LayerTransform:
    """The basis of one layer, with its coefficients sorted by spread class.

    Coefficients are `[2 · kv_heads, n, head_dim]`, keys' heads first. Columns are the `2 · kv_heads · head_dim`
    coefficients of a token, by rising class.

    Attributes:
        basis: of the model.
        layer: from 0.
    """

    basis: SpectralBasis
    layer: int

    @cached_property
    def _classes(self) -> np.ndarray:
        """Spread class of each coefficient, in the order side, head, element."""
        return spread_classes(self.basis.spread[self.layer].flatten().numpy())

    @cached_property
    def order(self) -> np.ndarray:
        """int64 `[columns]`: the coefficient, in the order side, head, element, of each column."""
        return np.argsort(self._classes, kind="stable")

    @cached_property
    def run_classes(self) -> np.ndarray:
        """int64 `[runs]`: the spread classes that there are, rising."""
        return np.unique(self._classes)

    @cached_property
    def run_start(self) -> np.ndarray:
        """int64 `[runs + 1]`: the first column of each class."""
        edges = np.searchsorted(self._classes[self.order], self.run_classes)
        return np.append(edges, len(self.order)).astype(np.int64)

    def column_offset(self, tokens: int) -> np.ndarray:
        """int64 `[columns]`: where the first token's coefficients lie, among those of `tokens` tokens."""
        head, element = np.divmod(self.order, self.basis.head_dim)
        return (head * tokens * self.basis.head_dim + element).astype(np.int64)

    def analyse(self, keys: torch.Tensor, values: torch.Tensor, first: int) -> torch.Tensor:
        """Coefficients of tokens at positions `first` and up.

        Args:
            keys: `[kv_heads, n, head_dim]` on the CPU, after the rotary embedding.
            values: like `keys`.
            first: position of the first token.

        Returns:
            float32 `[2 · kv_heads, n, head_dim]`.
        """
        basis = self.basis
        heads, tokens, head_dim = keys.shape
        cosine, sine = basis.rotation(first, tokens)
        states = torch.empty(2 * heads, tokens, head_dim)
        scaling = np.float32(1 / basis.rope_scaling)
        streams.rotate(keys.float().numpy(), cosine.numpy(), -sine.numpy(), scaling, states[:heads].numpy())
        states[heads:].copy_(values)
        return torch.baddbmm(self._offset, states, basis.analysis[self.layer].flatten(0, 1))

    def synthesise(self, coefficients: torch.Tensor, first: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Inverse of `analyse`: write keys, after the rotary embedding, and values.

        Args:
            coefficients: float32 `[2 · kv_heads, n, head_dim]`.
            first: position of the first token.
            keys: `[kv_heads, n, head_dim]`, any dtype, strides and device.
            values: like `keys`.
        """
        basis = self.basis
        heads, tokens, _ = keys.shape
        mean, synthesis = basis.mean[self.layer].flatten(0, 1)[:, None], basis.synthesis[self.layer].flatten(0, 1)
        states = torch.baddbmm(mean, coefficients, synthesis)
        cosine, sine = basis.rotation(first, tokens)
        unturned, turned = states[:heads], keys if _is_plain(keys) else states[:heads]
        scaling = np.float32(basis.rope_scaling)
        streams.rotate(unturned.numpy(), cosine.numpy(), sine.numpy(), scaling, turned.numpy())
        if turned is not keys:
            keys.copy_(turned)
        values.copy_(states[heads:])

    @cached_property
    def _offset(self) -> torch.Tensor:
        """What the mean takes away from coefficients: `[2 · kv_heads, 1, head_dim]`."""
        mean = self.basis.mean[self.layer].flatten(0, 1)[:, None]
        return -mean @ self.basis.analysis[self.layer].flatten(0, 1)


@lru_cache(maxsize=8)
def layer_transforms(basis: SpectralBasis) -> tuple[LayerTransform, ...]:
    """The transforms of all layers; requests that use one basis share them."""
    return tuple(LayerTransform(basis, layer) for layer in range(basis.mean.shape[0]))


def _is_plain(states: torch.Tensor) -> bool:
    """Whether compiled loops can write to the tensor's own memory."""
    return states.dtype == torch.float32 and not states.is_cuda
