"""Bodies: the bytes of one segment, as sections that lie back to back.

A layout lists its sections once. Lengths, offsets and views all come from that list, so that what encodes a body and
what decodes it cannot disagree about them.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch


@dataclass(frozen=True)
class Section:
    """One C-ordered array in a body.

    Attributes:
        tier: the tier whose bytes these are, one of `spectrumkv.kernels.tiers.TIER_CODES`.
        shape: of the array; a dimension may be 0.
        dtype: of its elements.
    """

    tier: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Length of the array."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class BodyLayout:
    """The sections of a body, back to back.

    Attributes:
        sections: in the order in which they lie there.
    """

    sections: tuple[Section, ...]

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """The bytes of each section."""
        return tuple(section.bytes for section in self.sections)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each section begins, in bytes, and the body's length."""
        return tuple(accumulate(self.lengths, initial=0))

    @cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shape of each section."""
        return tuple(section.shape for section in self.sections)

    @property
    def bytes(self) -> int:
        """Length of the body."""
        return self.offsets[-1]

    def split(self, body: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Split a body into the bytes of its sections.

        Args:
            body: uint8 `[bytes]`, contiguous, at any address.

        Returns:
            Views of `body`, uint8, one for each section.
        """
        pieces: tuple[torch.Tensor, ...] = torch.split(body, list(self.lengths))
        return pieces

    def arrays(self, body: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Show a body as its sections.

        Args:
            body: uint8 `[bytes]`, contiguous.

        Returns:
            A tensor of each section's shape and dtype: a view of `body`, or a copy where the section lies at an
            address that its elements cannot have. In a body with memory of its own no section does.
        """
        arrays = []
        for piece, section in zip(self.split(body), self.sections, strict=True):
            # Torch views bytes as wider elements only at a multiple of their width from the start of their storage.
            aligned = piece if piece.storage_offset() % section.dtype.itemsize == 0 else piece.clone()
            arrays.append(aligned.view(section.dtype).view(section.shape))
        return tuple(arrays)
