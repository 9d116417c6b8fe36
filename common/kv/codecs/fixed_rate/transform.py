"""The transform of one layer, as the kernels take it."""

from dataclasses import dataclass
from functools import cached_property

import torch

from spectrumkv.common.kv.codecs.calibrated.layer import CalibratedLayer
from spectrumkv.common.kv.codecs.fixed_rate.statistics import calibrated_scales
from spectrumkv.kernels.fixed_rate.layout import RowScales
from spectrumkv.kernels.fixed_rate.operands import TokenTransform


@dataclass(frozen=True, eq=False)
class LayerTransform(CalibratedLayer):
    """The transform of one layer's tokens, as the kernels of codec fixed_rate take it."""

    @property
    def rows(self) -> int:
        """Count the coefficients of a token."""
        return len(self.std)

    @cached_property
    def calibrated(self) -> RowScales:
        """Return the calibrated scales."""
        return calibrated_scales(self.std, 0)

    def analysis(self, first: int, tokens: int) -> TokenTransform:
        """Return the transform of a run of tokens to coefficients.

        Args:
            first: position of the first token.
            tokens: how many there are.
        """
        return self._transform(first, tokens, self.basis.analysis[self.layer])

    def synthesis(self, first: int, tokens: int) -> TokenTransform:
        """Return the transform of coefficients to a run of tokens; see `analysis`."""
        return self._transform(first, tokens, self.basis.synthesis[self.layer])

    def _transform(self, first: int, tokens: int, matrices: torch.Tensor) -> TokenTransform:
        cosine, sine = self.basis.rotation(self.layer, first, tokens)
        return TokenTransform(cosine, sine, self.rope_scaling, self.basis.mean[self.layer], matrices)
