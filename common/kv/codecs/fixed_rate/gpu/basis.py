"""What a GPU looks up of a basis: it goes there once, and requests that use the basis share it."""

from collections.abc import Callable
from functools import cached_property, lru_cache, partial

import torch

from spectrumkv.common.kv.codecs.calibrated.basis import CalibratedBasis, angles
from spectrumkv.common.kv.codecs.calibrated.importance import SENSITIVITY_POWER
from spectrumkv.common.kv.codecs.fixed_rate.gains import gain_scales
from spectrumkv.common.kv.codecs.fixed_rate.rate import later_groups
from spectrumkv.common.kv.codecs.fixed_rate.transform import LayerTransform
from spectrumkv.kernels.fixed_rate.triton.tables import AnalysisTables, Angles, SynthesisTables, upload_to_stay


class DeviceBasis:
    """A basis on a GPU.

    Args:
        basis: of the model.
        device: the GPU.

    Attributes:
        kinds: the number of each layer's way to turn keys; layers that turn them alike share one.
    """

    def __init__(self, basis: CalibratedBasis, device: torch.device) -> None:
        self._basis = basis
        self._device = device
        of_layers = [tuple(one) for one in basis.rope_frequencies.tolist()]
        distinct = list(dict.fromkeys(of_layers))
        self.kinds = [distinct.index(one) for one in of_layers]
        made: list[Callable[[int], tuple[torch.Tensor, torch.Tensor]]] = [partial(angles, one, 0) for one in distinct]
        self._angles = Angles(made, device)
        self._analysis: dict[int, AnalysisTables] = {}
        self._gain_scales: dict[int, torch.Tensor] = {}

    def angles(self, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosine and sine of all kinds, float32 `[kinds, positions or more, head_dim / 2]`.

        Args:
            positions: how many are needed.
        """
        return self._angles.up_to(positions)

    def analysis(self, layer: int) -> AnalysisTables:
        """Return what coding needs of a layer.

        Args:
            layer: from 0.
        """
        if layer not in self._analysis:
            self._analysis[layer] = self._made(layer)
        return self._analysis[layer]

    def gain_scales(self, level: int) -> torch.Tensor:
        """Return what tells gains: float32 `[layers, rows]`.

        Args:
            level: see `gains.gain_level`.
        """
        if level not in self._gain_scales:
            (self._gain_scales[level],) = upload_to_stay((gain_scales(self._basis, level),), self._device)
        return self._gain_scales[level]

    @cached_property
    def synthesis(self) -> SynthesisTables:
        """Return what decoding needs of all layers."""
        basis = self._basis
        parts = (basis.mean.flatten(1, 2), basis.synthesis.flatten(1, 2), basis.rope_scaling.float())
        return SynthesisTables(*upload_to_stay(parts, self._device))

    def _made(self, layer: int) -> AnalysisTables:
        basis, transforms = self._basis, LayerTransform.of_layers(self._basis)
        scales, later = transforms[layer].calibrated, later_groups(transforms)
        arrays = (
            basis.mean[layer].flatten(0, 1),
            basis.analysis[layer].flatten(0, 1),
            torch.from_numpy(scales.top - scales.drops.astype("int32")).int(),
            torch.from_numpy(scales.group_exponents).int(),
            torch.from_numpy(later.counts[layer]).int(),
        )
        return AnalysisTables.on_device(
            arrays,
            self._device,
            lowest_quarter=later.lowest,
            is_last=layer == len(transforms) - 1,
            scaling=float(basis.rope_scaling[layer]),
            step_exponent=-SENSITIVITY_POWER * float(basis.attention_exponent[layer]),
        )


@lru_cache(maxsize=4)
def device_basis(basis: CalibratedBasis, device: torch.device) -> DeviceBasis:
    """Return a basis on a device; requests that use it share it."""
    return DeviceBasis(basis, device)
