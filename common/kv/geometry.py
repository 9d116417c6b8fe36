"""The shape of a KV cache."""

from dataclasses import dataclass

import torch

from spectrumkv.common.errors import InvalidArgumentError

NATIVE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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
