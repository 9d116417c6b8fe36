"""The transform of one layer, as the kernels take it."""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch

from spectrumkv.common.kv.codecs.fixed_rate.statistics import calibrated_scales
from spectrumkv.common.kv.codecs.spectral.basis import SpectralBasis
from spectrumkv.kernels.fixed_rate.block import BlockTransform
from spectrumkv.kernels.fixed_rate.layout import RowScales


@dataclass(frozen=True, eq=False)
class LayerTransform:
    """The transform of one layer's tokens. A row is one coefficient of one head, in the order side, head, element.

    Attributes:
        basis: of the model.
        layer: from 0.
    """

    basis: SpectralBasis
    layer: int

    @property
    def rows(self) -> int:
        """Count the coefficients of a token."""
        return len(self.std)

    @cached_property
    def std(self) -> np.ndarray:
        """Return the calibrated spreads: float32 `[rows]`."""
        std: np.ndarray = self.basis.std[self.layer].flatten().numpy()
        return std

    @cached_property
    def inverse_std(self) -> torch.Tensor:
        """Return 1 ÷ the calibrated spreads: float32 `[rows]`."""
        return 1 / self.basis.std[self.layer].flatten()

    @cached_property
    def calibrated(self) -> RowScales:
        """Return the calibrated scales."""
        return calibrated_scales(self.std, 0)

    def analysis(self, first: int, tokens: int) -> BlockTransform:
        """Return the transform of a run of tokens to coefficients.

        Args:
            first: position of the first token.
            tokens: how many there are.
        """
        return self._transform(first, tokens, self.basis.analysis[self.layer])

    def synthesis(self, first: int, tokens: int) -> BlockTransform:
        """Return the transform of coefficients to a run of tokens; see `analysis`."""
        return self._transform(first, tokens, self.basis.synthesis[self.layer])

    def _transform(self, first: int, tokens: int, matrices: torch.Tensor) -> BlockTransform:
        cosine, sine = self.basis.rotation(self.layer, first, tokens)
        scaling = float(self.basis.rope_scaling[self.layer])
        return BlockTransform(cosine, sine, scaling, self.basis.mean[self.layer], matrices)


@lru_cache(maxsize=4)
def layer_transforms(basis: SpectralBasis) -> tuple[LayerTransform, ...]:
    """Return the transforms of all layers; requests that use one basis share them."""
    return tuple(LayerTransform(basis, layer) for layer in range(basis.mean.shape[0]))
