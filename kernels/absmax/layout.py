"""The two code formats of absmax quantization, and how a body has them.

Symmetric absmax quantization, as in the SpectrumKV paper (arXiv 2606.08635): the elements of one token in
one KV head share the scale `absmax / largest`, and an element becomes the nearest integer multiple of it.
"""

from dataclasses import dataclass

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
        """Bytes of the codes of one token in one KV head."""
        return head_dim * self.bits // 8


INT8 = CodeFormat(bits=8, largest=127)
INT4 = CodeFormat(bits=4, largest=7)


def section_bytes(n16: int, n8: int, n4: int, kv_heads: int, head_dim: int) -> list[int]:
    """Lengths of the sections of a body, in its order.

    Args:
        n16: the segment's tokens at 16 bits.
        n8: at INT8.
        n4: at INT4.
        kv_heads: of the model.
        head_dim: of the model.
    """
    a_token = (n16 * 2 * head_dim, n8 * 2, n4 * 2, n8 * INT8.code_bytes(head_dim), n4 * INT4.code_bytes(head_dim))
    return [2 * kv_heads * size for size in a_token]


def body_bytes(tiers: torch.Tensor, kv_heads: int, head_dim: int) -> int:
    """Length of the body of a segment whose tokens have these tiers, uint8 `[n]` on the CPU."""
    n16, n8, n4 = (int((tiers == tier).sum()) for tier in (TIER_16BIT, TIER_INT8, TIER_INT4))
    return sum(section_bytes(n16, n8, n4, kv_heads, head_dim))


@dataclass(frozen=True)
class Parts:
    """The sections of a coded segment of `n16 + n8 + n4` tokens; index 0 of each tensor is keys, 1 values.

    Tokens of a tier are in the order of the segment.

    Attributes:
        fp16: the model's 16-bit dtype `[2, kv_heads, n16, head_dim]`.
        int8_scales: float16 `[2, kv_heads, n8]`.
        int4_scales: float16 `[2, kv_heads, n4]`.
        int8_codes: int8 `[2, kv_heads, n8, head_dim]`.
        int4_codes: uint8 `[2, kv_heads, n4, head_dim / 2]`.
    """

    fp16: torch.Tensor
    int8_scales: torch.Tensor
    int4_scales: torch.Tensor
    int8_codes: torch.Tensor
    int4_codes: torch.Tensor

    @classmethod
    def of(cls, body: torch.Tensor, tiers: torch.Tensor, kv_heads: int, head_dim: int, half: torch.dtype) -> "Parts":
        """Views of a body: the sections back to back in the order of the attributes.

        Args:
            body: uint8 `[b]`, at an even address.
            tiers: uint8 `[n]` on the CPU.
            kv_heads: of the model.
            head_dim: of the model.
            half: the model's 16-bit dtype.
        """
        n16, n8, n4 = (int((tiers == tier).sum()) for tier in (TIER_16BIT, TIER_INT8, TIER_INT4))
        shapes = [(half, n16, head_dim), (torch.float16, n8, 1), (torch.float16, n4, 1)]
        shapes += [(form.dtype, n, form.code_bytes(head_dim)) for form, n in ((INT8, n8), (INT4, n4))]
        sizes = section_bytes(n16, n8, n4, kv_heads, head_dim)
        views = [
            part.view(dtype).view(2, kv_heads, tokens, width)
            for part, (dtype, tokens, width) in zip(torch.split(body, sizes), shapes, strict=True)
        ]
        return cls(views[0], views[1].squeeze(-1), views[2].squeeze(-1), views[3], views[4])

    def coded(self, form: CodeFormat) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales of one format."""
        if form == INT8:
            return self.int8_codes, self.int8_scales
        return self.int4_codes, self.int4_scales
