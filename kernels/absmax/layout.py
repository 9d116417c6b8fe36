"""The formats of absmax codes and the layout of a body, for the CPU loops, Triton and the reference alike.

Symmetric absmax quantization, as in the SpectrumKV paper (arXiv 2606.08635): the elements of one token in
one KV head share the scale `absmax / largest`, and an element becomes the nearest integer multiple of it.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch

from spectrumkv.kernels.body import BodyLayout, Section
from spectrumkv.kernels.tiers import TIER_16BIT, TIER_CODES, TIER_INT4, TIER_INT8, tier_counts


@dataclass(frozen=True)
class CodeFormat:
    """A format of integer codes.

    Attributes:
        bits: width of one code, 8 or 4.
        largest: greatest code; the least is its negative, so that zero is exact and signs are alike.
    """

    bits: int
    largest: int

    def __post_init__(self) -> None:
        if self.bits not in (4, 8) or self.largest != (1 << (self.bits - 1)) - 1:
            raise ValueError(f"{self.bits}-bit codes up to {self.largest}; allowed: 8 up to 127, 4 up to 7")

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


Each = TypeVar("Each")


class BodySections(NamedTuple, Generic[Each]):
    """One thing for each section of a body: its tensor, its place, its `Section`.

    The order of the fields is the order of the sections in a body, and nothing else states it: what kept its 16
    bits, then scales, then codes. Index 0 of each section is keys, 1 values. Tokens of a tier are in the order of
    the segment.

    Attributes:
        floats: the model's 16-bit dtype `[2, kv_heads, n16, head_dim]`.
        int8_scales: float16 `[2, kv_heads, n8]`.
        int4_scales: float16 `[2, kv_heads, n4]`.
        int8_codes: int8 `[2, kv_heads, n8, head_dim]`.
        int4_codes: uint8 `[2, kv_heads, n4, head_dim / 2]`.
    """

    floats: Each
    int8_scales: Each
    int4_scales: Each
    int8_codes: Each
    int4_codes: Each

    def coded(self, form: CodeFormat) -> tuple[Each, Each]:
        """Return what belongs to the codes and to the scales of one format."""
        if form == INT8:
            return self.int8_codes, self.int8_scales
        return self.int4_codes, self.int4_scales


# Where each section stands among the sections of a layout.
PLACES = BodySections(*range(len(BodySections._fields)))


# Most layers of a request have the same counts, and making a layout takes a fifth of the time of a short segment.
@lru_cache(maxsize=1024)
def body_layout(counts: tuple[int, ...], kv_heads: int, head_dim: int, half: torch.dtype) -> BodyLayout:
    """Lay out the body of a segment, in the order of `BodySections`.

    Args:
        counts: how many of the segment's tokens have each tier, by its code.
        kv_heads: of the model.
        head_dim: of the model, even.
        half: the model's 16-bit dtype; lengths do not depend on it.

    Returns:
        The sections and where they lie.
    """
    n16, n8, n4 = counts[TIER_16BIT], counts[TIER_INT8], counts[TIER_INT4]
    return BodyLayout(
        BodySections(
            floats=Section(TIER_16BIT, (2, kv_heads, n16, head_dim), half),
            int8_scales=Section(TIER_INT8, (2, kv_heads, n8), torch.float16),
            int4_scales=Section(TIER_INT4, (2, kv_heads, n4), torch.float16),
            int8_codes=Section(TIER_INT8, (2, kv_heads, n8, INT8.code_bytes(head_dim)), INT8.dtype),
            int4_codes=Section(TIER_INT4, (2, kv_heads, n4, INT4.code_bytes(head_dim)), INT4.dtype),
        )
    )


@lru_cache(maxsize=16)
def token_bytes(kv_heads: int, head_dim: int) -> tuple[int, ...]:
    """Return what a token takes of a body, by its tier's code up to 16 bits.

    Args:
        kv_heads: of the model.
        head_dim: of the model, even.
    """
    return tuple(
        body_layout(_only_one(tier), kv_heads, head_dim, torch.float16).bytes for tier in range(TIER_16BIT + 1)
    )


@lru_cache(maxsize=16)
def section_offsets(kv_heads: int, head_dim: int) -> np.ndarray:
    """Tell what each token of a segment adds to the byte at which the sections of each tier begin.

    Where a section begins is the sum of the lengths before it, and each length is proportional to a number of tokens.
    So a GPU computes it from these factors, whatever the numbers are.

    Args:
        kv_heads: of the model.
        head_dim: of the model, even.

    Returns:
        int64 `[TIER_16BIT + 1, 2, 3]`: by the tier whose section it is, for elements and for scales (elements at 16
        bits have none, and their own place stands for it), by the tier of the token: INT4, INT8 and 16 bits.
    """
    offsets = np.zeros((TIER_16BIT + 1, 2, 3), np.int64)
    for column, tier in enumerate((TIER_INT4, TIER_INT8, TIER_16BIT)):
        begins = body_layout(_only_one(tier), kv_heads, head_dim, torch.float16).offsets
        offsets[TIER_16BIT, :, column] = begins[PLACES.floats]
        for coded, form in FORMATS.items():
            offsets[coded, :, column] = [begins[place] for place in PLACES.coded(form)]
    return offsets


def _only_one(tier: int) -> tuple[int, ...]:
    """Return the counts of a segment of one token."""
    return tuple(int(one == tier) for one in TIER_CODES)


def segment_layout(
    tiers: torch.Tensor, kv_heads: int, head_dim: int, half: torch.dtype = torch.float16
) -> BodyLayout:
    """Lay out the body of the segment whose tokens have these tiers; see `body_layout`.

    Args:
        tiers: uint8 `[n]` on the CPU.
        kv_heads: of the model.
        head_dim: of the model, even.
        half: the model's 16-bit dtype; lengths do not depend on it.

    Returns:
        The sections and where they lie.
    """
    return body_layout(tier_counts(tiers.numpy()), kv_heads, head_dim, half)
