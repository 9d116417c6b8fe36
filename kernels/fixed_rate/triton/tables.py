"""What kernels look up on the GPU: quantizers, and what a basis says of a model's layers. It goes there once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from spectrumkv.kernels.fixed_rate.layout import EIGHTH_BORDERS, EXPONENT_UNITS, WIDTH_THRESHOLDS
from spectrumkv.kernels.fixed_rate.quantizer import quantizers
from spectrumkv.kernels.upload import upload


@dataclass(frozen=True, eq=False)
class QuantizerTables:
    """The constants of the layout on a device.

    Attributes:
        offset: int32 `[WIDEST + 1, PIECES]`; see `quantizer.Quantizers`, as for the next ones.
        slope: int32, like `offset`.
        level: float32 `[2^(WIDEST + 2)]`.
        limit: float32, by ratio.
        thresholds: int32 `[WIDEST]`, `layout.WIDTH_THRESHOLDS`.
        borders: int32 `[8]`, `layout.EIGHTH_BORDERS`.
        powers: float32 `[8]`, 2 to the power of so many eighths.
    """

    offset: torch.Tensor
    slope: torch.Tensor
    level: torch.Tensor
    limit: torch.Tensor
    thresholds: torch.Tensor
    borders: torch.Tensor
    powers: torch.Tensor


def upload_to_stay(parts: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Copy tensors of the host to a device for all streams; see `upload`.

    What a stream uploads is there for that stream; nothing tells the others when. So the host waits, this once.

    Args:
        parts: see `upload`.
        device: where they are wanted.

    Returns:
        See `upload`.
    """
    there = upload([part.contiguous() for part in parts], device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return there


@lru_cache(maxsize=8)
def quantizer_tables(device: torch.device) -> QuantizerTables:
    """Return the constants of the layout on a device."""
    table = quantizers()
    powers = np.exp2(np.arange(EXPONENT_UNITS) / EXPONENT_UNITS).astype(np.float32)
    arrays = (
        table.offset, table.slope, table.level, table.limit, WIDTH_THRESHOLDS.astype(np.int32), EIGHTH_BORDERS, powers
    )  # fmt: skip
    return QuantizerTables(*upload_to_stay([torch.from_numpy(one) for one in arrays], device))


@dataclass(frozen=True, eq=False)
class AnalysisTables:
    """What coding needs of one layer's basis, on a device. R rows in G groups, H KV heads, d elements.

    Attributes:
        mean: float32 `[2H, d]`, keys' heads first.
        analysis: float32 `[2H, d, d]`, a column for each coefficient.
        exponents: int32 `[R]`, of the calibrated standard deviations.
        group_exponents: int32 `[G]`, of the calibrated scales.
        later: int32 `[Q]`, how many groups of all later layers lie in each quarter octave; one element where none do.
        quarters: Q, or 0 in the last layer.
        lowest_quarter: of `later`'s first element.
        scaling: factor that the rotary embedding applies to keys besides the rotation.
        step_exponent: power of a token's share of the attention that its step goes with.
    """

    mean: torch.Tensor
    analysis: torch.Tensor
    exponents: torch.Tensor
    group_exponents: torch.Tensor
    later: torch.Tensor
    quarters: int
    lowest_quarter: int
    scaling: float
    step_exponent: float

    @classmethod
    def on_device(
        cls, arrays: Sequence[torch.Tensor], device: torch.device, lowest_quarter: int, is_last: bool, scaling: float,
        step_exponent: float,
    ) -> "AnalysisTables":  # fmt: skip
        """Bring the tables of a layer to a device by one copy.

        Args:
            arrays: the tensors in the order of the attributes, on the CPU.
            device: where they are wanted.
            lowest_quarter: see the class, like the others.
            is_last: whether no layer comes later.
            scaling: see the class.
            step_exponent: see the class.

        Returns:
            The tables.
        """
        mean, analysis, exponents, group_exponents, later = upload_to_stay(arrays, device)
        quarters = 0 if is_last else later.numel()
        return cls(
            mean, analysis, exponents, group_exponents, later, quarters, lowest_quarter, scaling,
            step_exponent,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class SynthesisTables:
    """What decoding needs of a basis, on a device.

    Attributes:
        mean: float32 `[layers, 2H, d]`.
        synthesis: float32 `[layers, 2H, d, d]`, a row for each coefficient.
        scaling: float32 `[layers]`.
    """

    mean: torch.Tensor
    synthesis: torch.Tensor
    scaling: torch.Tensor


class Angles:
    """Cosine and sine of a model's rotary angles on a device, for as many positions as were asked for.

    Args:
        kinds: for each way that layers turn keys, what makes float32 `[positions, d / 2]` of both from position 0 on.
        device: where they are wanted.
    """

    def __init__(
        self, kinds: Sequence[Callable[[int], tuple[torch.Tensor, torch.Tensor]]], device: torch.device
    ) -> None:
        self._kinds = kinds
        self._device = device
        self._tables: list[tuple[torch.Tensor, torch.Tensor]] = []

    def up_to(self, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosine and sine, float32 `[kinds, positions or more, d / 2]` each.

        A table has a power of two of positions, so that few are made in a service's life. Smaller ones stay, since
        another stream may still read them; together they are no larger than the last one.

        Args:
            positions: how many are needed.
        """
        if not self._tables or self._tables[-1][0].shape[1] < positions:
            length = max(256, 1 << (positions - 1).bit_length())
            made = [kind(length) for kind in self._kinds]
            cosine, sine = (torch.stack([one[side] for one in made]) for side in range(2))
            cosine, sine = upload_to_stay([cosine, sine], self._device)
            self._tables.append((cosine, sine))
        return self._tables[-1]
