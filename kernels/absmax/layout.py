"""The formats of absmax codes and the layout of a body, for the CPU loops, Triton and the reference alike.

Symmetric absmax quantization, as in the SpectrumKV paper (arXiv 2606.08635): the elements of one token in
one KV head share the scale `absmax / largest`, and an element becomes the nearest integer multiple of it.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

# The codes of the wire's tier map. A token at TIER_16BIT keeps its elements, in the model's 16-bit dtype.
TIER_DROP, TIER_INT4, TIER_INT8, TIER_16BIT = range(4)


@dataclass(frozen=True)
class CodeFormat:
    """How integer codes are stored.

    Attributes:
        bits: width of one code, 8 or 4.
        largest: greatest code; the least is its negative, so that zero is exact and signs are alike.
    """

    bits: int
    largest: int

    def __post_init__(self) -> None:
        if self.bits not in (4, 8) or self.largest != (1 << (self.bits - 1)) - 1:
            raise ValueError(f"{self.bits}-bit codes up to {self.largest}; valid: 8 up to 127, 4 up to 7")

    @property
    def dtype(self) -> torch.dtype:
        """int8 where an element has a byte of its own, uint8 where two share one."""
        return torch.int8 if self.bits == 8 else torch.uint8

    def code_bytes(self, head_dim: int) -> int:
        """Return the bytes of the codes of one token in one KV head."""
        return head_dim * self.bits // 8


FLOAT16_MAX = torch.finfo(torch.float16).max
INT8 = CodeFormat(bits=8, largest=127)
INT4 = CodeFormat(bits=4, largest=7)
FORMATS = {TIER_INT8: INT8, TIER_INT4: INT4}


@dataclass(frozen=True)
class Section:
    """One C-ordered array in a body.

    Attributes:
        tier: the tier whose bytes these are, a code of the wire's tier map.
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


# Where each section stands among those of `sections`.
FLOATS, INT8_SCALES, INT4_SCALES, INT8_CODES, INT4_CODES = range(5)
# The first sections hold 16-bit floats, elements and scales; the others hold codes.
FLOAT_SECTIONS = INT8_CODES


def sections(counts: Sequence[int], kv_heads: int, head_dim: int, half: torch.dtype) -> tuple[Section, ...]:
    """Lay out the body of a segment: what kept its 16 bits, then scales, then codes, back to back.

    This is the one place that knows the order. Index 0 of each array is keys, 1 values. Tokens of a tier are in the
    order of the segment.

    Args:
        counts: how many of the segment's tokens have each tier, by its code.
        kv_heads: of the model.
        head_dim: of the model, even.
        half: the model's 16-bit dtype.

    Returns:
        The sections, in the order of `FLOATS` … `INT4_CODES`.
    """
    n16, n8, n4 = counts[TIER_16BIT], counts[TIER_INT8], counts[TIER_INT4]
    return (
        Section(TIER_16BIT, (2, kv_heads, n16, head_dim), half),
        Section(TIER_INT8, (2, kv_heads, n8), torch.float16),
        Section(TIER_INT4, (2, kv_heads, n4), torch.float16),
        Section(TIER_INT8, (2, kv_heads, n8, INT8.code_bytes(head_dim)), INT8.dtype),
        Section(TIER_INT4, (2, kv_heads, n4, INT4.code_bytes(head_dim)), INT4.dtype),
    )


def section_offsets(layout: Iterable[Section]) -> tuple[int, ...]:
    """Return where each section begins in its body, in bytes, and the body's length."""
    return tuple(accumulate((section.bytes for section in layout), initial=0))


def count_tiers(tiers: np.ndarray) -> list[int]:
    """Count the tokens of each tier.

    Args:
        tiers: uint8 `[n]`, codes of the wire's tier map.

    Returns:
        A number for each code from `TIER_DROP` to `TIER_16BIT`.
    """
    counts: list[int] = np.bincount(tiers, minlength=TIER_16BIT + 1).tolist()
    return counts


def body_bytes(tiers: torch.Tensor, kv_heads: int, head_dim: int) -> int:
    """Return the length of the body of a segment.

    Args:
        tiers: uint8 `[n]` on the CPU, those of its tokens.
        kv_heads: of the model.
        head_dim: of the model.

    Returns:
        Bytes; they do not depend on which 16-bit dtype the model has.
    """
    return section_offsets(sections(count_tiers(tiers.numpy()), kv_heads, head_dim, torch.float16))[-1]


@dataclass(frozen=True)
class BodySections:
    """The sections of a body as tensors; see `sections`.

    Attributes:
        floats: the model's 16-bit dtype `[2, kv_heads, n16, head_dim]`.
        int8_scales: float16 `[2, kv_heads, n8]`.
        int4_scales: float16 `[2, kv_heads, n4]`.
        int8_codes: int8 `[2, kv_heads, n8, head_dim]`.
        int4_codes: uint8 `[2, kv_heads, n4, head_dim / 2]`.
    """

    floats: torch.Tensor
    int8_scales: torch.Tensor
    int4_scales: torch.Tensor
    int8_codes: torch.Tensor
    int4_codes: torch.Tensor

    @classmethod
    def of(
        cls, body: torch.Tensor, tiers: torch.Tensor, kv_heads: int, head_dim: int, half: torch.dtype
    ) -> "BodySections":
        """Cut a body into views.

        Args:
            body: uint8 `[body_bytes]`, at an even address.
            tiers: uint8 `[n]` on the CPU.
            kv_heads: of the model.
            head_dim: of the model.
            half: the model's 16-bit dtype.

        Returns:
            Views of `body`.
        """
        layout = sections(count_tiers(tiers.numpy()), kv_heads, head_dim, half)
        pieces = torch.split(body, [section.bytes for section in layout])
        views = (one.view(section.dtype).view(section.shape) for one, section in zip(pieces, layout, strict=True))
        return cls(*views)

    def coded(self, form: CodeFormat) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes and scales of one format."""
        if form == INT8:
            return self.int8_codes, self.int8_scales
        return self.int4_codes, self.int4_scales
