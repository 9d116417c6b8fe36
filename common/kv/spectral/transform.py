"""One layer's keys and values to coefficients and back."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch

from spectrumkv.common.kv.spectral.basis import SpectralBasis
from spectrumkv.common.kv.spectral.layout import CLASSES_PER_OCTAVE, StreamLayout, mean_bits, spread_classes
from spectrumkv.kernels import spectral_rows as kernels
from spectrumkv.kernels.strided import adjacent, flat


@dataclass(frozen=True, eq=False)
class LayerTransform:
    """The basis of one layer, with its coefficients sorted by spread class.

    Coefficients are `[2 · kv_heads, head_dim, n]`, keys' heads first. A row is one coefficient of all tokens.

    Attributes:
        basis: of the model.
        layer: from 0.
    """

    basis: SpectralBasis
    layer: int

    @cached_property
    def _classes(self) -> np.ndarray:
        """Spread class of each row, in the order side, head, element."""
        return spread_classes(self.basis.spread[self.layer].flatten().numpy())

    @cached_property
    def row_order(self) -> np.ndarray:
        """int64 `[rows]`: the rows by rising class, those of one class in the order side, head, element."""
        return np.argsort(self._classes, kind="stable")

    @cached_property
    def run_classes(self) -> np.ndarray:
        """int64 `[runs]`: the spread classes that there are, rising."""
        return np.unique(self._classes)

    @cached_property
    def run_start(self) -> np.ndarray:
        """int64 `[runs + 1]`: the first place in `row_order` of each class."""
        edges = np.searchsorted(self._classes[self.row_order], self.run_classes)
        return np.append(edges, len(self.row_order)).astype(np.int64)

    @cached_property
    def run_rows(self) -> np.ndarray:
        """int64 `[runs]`: how many rows each class has."""
        return np.diff(self.run_start)

    @cached_property
    def streams(self) -> StreamLayout:
        """Which symbols share a stream."""
        return StreamLayout.of(self.run_classes, self.run_rows)

    @cached_property
    def _run_exponents(self) -> np.ndarray:
        """float64 `[runs]`: binary logarithm of each class's spread."""
        return self.run_classes / CLASSES_PER_OCTAVE

    def mean_bits(self, steps: np.ndarray) -> np.ndarray:
        """Expected bits an element of tokens whose steps have these binary logarithms: float64 `[n]`, as `steps`."""
        return mean_bits(self._run_exponents, steps, self.run_rows)

    def analyse(self, keys: torch.Tensor, values: torch.Tensor, first: int, order: np.ndarray) -> torch.Tensor:
        """Coefficients of tokens at positions `first` and up.

        Args:
            keys: `[kv_heads, n, head_dim]` on the CPU, after the rotary embedding.
            values: like `keys`.
            first: position of the first token.
            order: int64 `[m]`, which tokens, and in which order.

        Returns:
            float32 `[2 · kv_heads, head_dim, m]`.
        """
        heads, tokens, head_dim = keys.shape
        cosine, sine = self.basis.rotation(first, tokens)
        states = torch.empty(2 * heads, len(order), head_dim)
        kernels.gather_unrotated(
            *flat(adjacent(keys.float())), order, cosine.numpy(), sine.numpy(),
            np.float32(1 / self.basis.rope_scaling), self._mean[:heads], states[:heads].numpy(),
        )  # fmt: skip
        kernels.gather(*flat(adjacent(values.float())), order, self._mean[heads:], states[heads:].numpy())
        return torch.bmm(self._analysis, states.transpose(1, 2))

    def synthesise(
        self, coefficients: torch.Tensor, first: int, order: np.ndarray, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Inverse of `analyse`: write keys, after the rotary embedding, and values.

        Args:
            coefficients: float32 `[2 · kv_heads, head_dim, n]`.
            first: position of the first token.
            order: int64 `[n]`, the token of each column: all of them, in any order.
            keys: `[kv_heads, n, head_dim]`, any dtype, strides and device.
            values: like `keys`.
        """
        heads, tokens, _ = keys.shape
        cosine, sine = self.basis.rotation(first, tokens)
        states = torch.bmm(coefficients.transpose(1, 2), self.basis.synthesis[self.layer].flatten(0, 1))
        with _written_rows(keys) as rows:
            kernels.scatter_rotated(
                states[:heads].numpy(), order, cosine.numpy(), sine.numpy(),
                np.float32(self.basis.rope_scaling), self._mean[:heads], *flat(rows),
            )  # fmt: skip
        with _written_rows(values) as rows:
            kernels.scatter(states[heads:].numpy(), order, self._mean[heads:], *flat(rows))

    @cached_property
    def _mean(self) -> np.ndarray:
        """float32 `[2 · kv_heads, head_dim]`."""
        mean: np.ndarray = self.basis.mean[self.layer].flatten(0, 1).numpy()
        return mean

    @cached_property
    def _analysis(self) -> torch.Tensor:
        """float32 `[2 · kv_heads, head_dim, head_dim]`, a row for each coefficient."""
        return self.basis.analysis[self.layer].flatten(0, 1).transpose(1, 2).contiguous()


@lru_cache(maxsize=8)
def layer_transforms(basis: SpectralBasis) -> tuple[LayerTransform, ...]:
    """The transforms of all layers; requests that use one basis share them."""
    return tuple(LayerTransform(basis, layer) for layer in range(basis.mean.shape[0]))


@contextmanager
def _written_rows(states: torch.Tensor) -> Iterator[torch.Tensor]:
    """Memory that compiled loops can write to: the states' own where it is of that kind, else copied at the end."""
    if states.dtype == torch.float32 and states.device.type == "cpu" and states.stride(-1) == 1:
        yield states
        return
    rows = torch.empty(states.shape)
    yield rows
    states.copy_(rows)
