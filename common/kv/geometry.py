"""The shape of a KV cache."""

from dataclasses import dataclass, replace

import torch

from spectrumkv.common.errors import InvalidArgumentError

NATIVE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class HeadRange:
    """Neighbouring KV heads of a model: those that one rank of a tensor-parallel group holds.

    Attributes:
        first: from 0.
        end: after the last one.

    Raises:
        InvalidArgumentError: the range is empty or starts before 0.
    """

    first: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.end:
            raise InvalidArgumentError(f"KV heads {self.first} to {self.end - 1} are no range")

    @classmethod
    def of_rank(cls, rank: int, degree: int, kv_heads: int) -> "HeadRange":
        """Return the KV heads that a rank holds, as Megatron-LM splits attention (arXiv 1909.08053, section 3).

        Args:
            rank: from 0.
            degree: ranks of the group.
            kv_heads: of the whole model. Where they are fewer than ranks, neighbouring ranks hold the same head.

        Raises:
            InvalidArgumentError: the heads cannot be split evenly, or there is no such rank.
        """
        if not 0 <= rank < degree:
            raise InvalidArgumentError(f"rank {rank} is not one of {degree}")
        if kv_heads >= degree:
            if kv_heads % degree:
                raise InvalidArgumentError(f"{kv_heads} KV heads cannot be split over {degree} ranks")
            each = kv_heads // degree
            return cls(rank * each, (rank + 1) * each)
        if degree % kv_heads:
            raise InvalidArgumentError(f"{degree} ranks cannot share {kv_heads} KV heads evenly")
        head = rank * kv_heads // degree
        return cls(head, head + 1)

    @property
    def count(self) -> int:
        """Count the heads."""
        return self.end - self.first

    def overlap(self, other: "HeadRange") -> "HeadRange | None":
        """Return the heads that are in both ranges; None where there are none."""
        first, end = max(self.first, other.first), min(self.end, other.end)
        return HeadRange(first, end) if first < end else None


@dataclass(frozen=True)
class KvGeometry:
    """The shape of one model's KV cache: what a token leaves in it.

    Attributes:
        layers: attention layers, each with a KV cache.
        kv_heads: KV heads of a layer (fewer than query heads under grouped-query attention).
        head_dim: elements of one key or value.
        native_dtype: dtype that the model computes in.
    """

    layers: int
    kv_heads: int
    head_dim: int
    native_dtype: torch.dtype

    def __post_init__(self) -> None:
        for name in ("layers", "kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise InvalidArgumentError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.head_dim % 2:
            raise InvalidArgumentError(f"head_dim is {self.head_dim}; INT4 packing needs an even one")
        if self.native_dtype not in NATIVE_DTYPES:
            raise InvalidArgumentError(f"model dtype {self.native_dtype} is not one of {NATIVE_DTYPES}")

    def of_heads(self, heads: HeadRange) -> "KvGeometry":
        """Return the shape of the part of the cache that some KV heads have.

        Args:
            heads: of this geometry.

        Raises:
            InvalidArgumentError: there are no such heads.
        """
        if heads.end > self.kv_heads:
            raise InvalidArgumentError(f"KV head {heads.end - 1} is asked for; the model has {self.kv_heads}")
        return replace(self, kv_heads=heads.count)

    @property
    def half_dtype(self) -> torch.dtype:
        """Return the 16-bit dtype of the FP16 tier: the model's own, or float16 for a float32 model."""
        return torch.float16 if self.native_dtype == torch.float32 else self.native_dtype

    @property
    def elements_per_token_layer(self) -> int:
        """Count the elements of one token in one layer, keys and values."""
        return 2 * self.kv_heads * self.head_dim

    @property
    def native_bytes_per_token_layer(self) -> int:
        """Count the bytes of one token in one layer at the model's own dtype."""
        return self.elements_per_token_layer * self.native_dtype.itemsize

    def fp16_bytes_per_layer(self, tokens: int) -> int:
        """Return the bytes of `tokens` tokens in one layer at 16 bits an element."""
        return tokens * self.elements_per_token_layer * 2

    def fp16_bytes(self, tokens: int) -> int:
        """Return the bytes of `tokens` tokens in all layers at 16 bits an element: the whole of a byte budget."""
        return self.layers * self.fp16_bytes_per_layer(tokens)
