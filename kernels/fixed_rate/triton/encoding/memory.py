"""What a layer leaves in memory of the GPU: bodies, which go to the host, and what kernels leave each other."""

from dataclasses import dataclass

import torch

from spectrumkv.kernels.fixed_rate.layout import GROUP_ROWS
from spectrumkv.kernels.fixed_rate.triton.encoding.segments import (
    FOUND_BASE,
    FOUND_BROKEN,
    FOUND_DRIFT,
    FOUND_SEGMENTS,
    FOUND_SMOOTH,
    SEGMENT_COLUMNS,
    SegmentShape,
)
from spectrumkv.kernels.fixed_rate.triton.integers import PADDED_PROFILES
from spectrumkv.kernels.upload import aligned


@dataclass(frozen=True)
class LayerRate:
    """What a layer may take.

    Attributes:
        words: of the records of this layer and, as foreseen, of all later ones.
        drift: by how much standard deviations lie above the calibrated ones, in units of a ratio, before this layer.
        drift_weight: with which what this layer shows of that counts.
        smooth_base: base of the layers before, smoothed.
        base_weight: with which the base that this layer foresees counts beside it.
    """

    words: int
    drift: float
    drift_weight: float
    smooth_base: float
    base_weight: float


@dataclass(frozen=True, eq=False)
class CodedLayer:
    """A layer's bodies and what was found out about it, in one piece of memory: one copy brings it to the host.

    Attributes:
        shape: of its segments.
        memory: uint8, on the GPU or on the host.
    """

    shape: SegmentShape
    memory: torch.Tensor

    @classmethod
    def on_device(cls, shape: SegmentShape, device: torch.device) -> "CodedLayer":
        """Obtain the memory of a layer.

        Args:
            shape: of its segments.
            device: where.

        Returns:
            The layer; its memory holds nothing yet.
        """
        size = _found_bytes(shape.segments) + shape.segments * shape.body_bytes
        return cls(shape, torch.empty(size, dtype=torch.uint8, device=device))

    def copied(self, memory: torch.Tensor) -> "CodedLayer":
        """Return the layer in other memory, into which its own was copied: uint8 `[bytes]` on the host."""
        return CodedLayer(self.shape, memory)

    @property
    def found(self) -> torch.Tensor:
        """Show what was found out: int64 `[FOUND_SEGMENTS + segments · SEGMENT_COLUMNS]`; see `triton.segments`."""
        return self.memory[: 8 * (FOUND_SEGMENTS + self.shape.segments * SEGMENT_COLUMNS)].view(torch.int64)

    @property
    def bodies(self) -> torch.Tensor:
        """Show the bodies without their headers, at multiples of `shape.body_bytes`: uint8."""
        return self.memory[_found_bytes(self.shape.segments) :]

    @property
    def broken_scores(self) -> int:
        """Return how many scores are infinite or NaN; on the host, like the others."""
        return int(self.found[FOUND_BROKEN])

    @property
    def base(self) -> int:
        """Return the base that was found."""
        return int(self.found[FOUND_BASE])

    @property
    def drift(self) -> float:
        """Return by how much standard deviations lie above the calibrated ones, this layer's included."""
        return float(self.found[FOUND_DRIFT : FOUND_DRIFT + 1].view(torch.float64))

    @property
    def smooth_base(self) -> float:
        """Return the base of the layers so far, smoothed, this layer's included."""
        return float(self.found[FOUND_SMOOTH : FOUND_SMOOTH + 1].view(torch.float64))

    @property
    def segments(self) -> list[list[int]]:
        """Return for each segment the columns of `triton.segments`: words, escapes, top, and what is not finite."""
        found: list[list[int]] = self.found[FOUND_SEGMENTS:].view(-1, SEGMENT_COLUMNS).tolist()
        return found


@dataclass(frozen=True, eq=False)
class Workspace:
    """What kernels leave each other on the GPU, of a layer of n tokens in B segments.

    Attributes:
        coefficients: float32 `[n, R]`.
        energies: float32 `[2H, n]`, of each token's scaled coefficients in each head.
        gains: int32 `[n]`.
        starts: int32 `[n]`, words before each token's record in its segment.
        escapes: int32 `[n, G]`, a bit for each row.
        exponents: int32 `[B, R]`, of the rows' standard deviations.
        row_means: float32 `[B, R]`, of the coefficients.
        drops: int32 `[B, R]`.
        order: int32 `[B, R]`, rows by falling standard deviation.
        ranks: int32 `[B, R]`, each row's index in that order.
        means: float32 `[B, R]`, as they are sent.
        inverse: float32 `[B, R]`, 1 ÷ the standard deviations as they are sent.
        groups: int32 `[B, G]`, exponents.
        histograms: int32 `[B, PADDED_PROFILES]`.
        steps: int32 `[2]`, base, and the token from which on it is one more.
        counters: int32 `[2B + 1]`, programs that are done.
    """

    coefficients: torch.Tensor
    energies: torch.Tensor
    gains: torch.Tensor
    starts: torch.Tensor
    escapes: torch.Tensor
    exponents: torch.Tensor
    row_means: torch.Tensor
    drops: torch.Tensor
    order: torch.Tensor
    ranks: torch.Tensor
    means: torch.Tensor
    inverse: torch.Tensor
    groups: torch.Tensor
    histograms: torch.Tensor
    steps: torch.Tensor
    counters: torch.Tensor

    @classmethod
    def on_device(cls, shape: SegmentShape, heads: int, rows: int, device: torch.device) -> "Workspace":
        """Obtain the memory.

        Args:
            shape: of the layer's segments.
            heads: of both sides.
            rows: coefficients of a token.
            device: where.

        Returns:
            The memory, which holds nothing yet.
        """
        tokens, number, groups = shape.tokens, shape.segments, -(-rows // GROUP_ROWS)

        def floats(*size: int) -> torch.Tensor:
            return torch.empty(size, dtype=torch.float32, device=device)

        def integers(*size: int) -> torch.Tensor:
            return torch.empty(size, dtype=torch.int32, device=device)

        return cls(
            floats(tokens, rows), floats(heads, tokens), integers(tokens), integers(tokens), integers(tokens, groups),
            integers(number, rows), floats(number, rows), integers(number, rows), integers(number, rows),
            integers(number, rows), floats(number, rows), floats(number, rows), integers(number, groups),
            integers(number, PADDED_PROFILES.value), integers(2), integers(2 * number + 1),
        )  # fmt: skip


def _found_bytes(segments: int) -> int:
    return aligned(8 * (FOUND_SEGMENTS + segments * SEGMENT_COLUMNS))
