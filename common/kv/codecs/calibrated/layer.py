"""One layer of a calibrated basis: what the transforms of both codecs are made of."""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Self

import numpy as np

from spectrumkv.common.kv.codecs.calibrated.basis import CalibratedBasis


@dataclass(frozen=True, eq=False)
class CalibratedLayer:
    """One layer of a basis. A row is one coefficient of one head, in the order side, head, element.

    Attributes:
        basis: of the model.
        layer: from 0.
    """

    basis: CalibratedBasis
    layer: int

    @classmethod
    @lru_cache(maxsize=4)
    def of_layers(cls, basis: CalibratedBasis) -> tuple[Self, ...]:
        """Return all layers of a basis; requests that use one basis share them.

        Args:
            basis: of the model.
        """
        return tuple(cls(basis, layer) for layer in range(basis.mean.shape[0]))

    @cached_property
    def std(self) -> np.ndarray:
        """Return the calibrated standard deviations: float32 `[rows]`."""
        std: np.ndarray = self.basis.std[self.layer].flatten().numpy()
        return std

    @cached_property
    def rope_scaling(self) -> float:
        """Return the factor that the rotary embedding applies to keys besides the rotation."""
        return float(self.basis.rope_scaling[self.layer])
