"""What a codec is, and the registry of them.

A codec turns the keys and values of a run of tokens in one layer into bytes and back. It knows nothing of
requests, chunks or networks. Its byte layout is documented in proto/spectrumkv/v1/kv.proto; any change of
the layout raises `version`, so that old and new refuse each other by name.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.tiers import Tier
from spectrumkv.common.registry import Registry


@dataclass(frozen=True)
class EncodedBlock:
    """A run of tokens of one layer, coded.

    Attributes:
        body: uint8 `[b]` on the CPU, `b` even.
        tier_bytes: how many bytes of `body` each tier took.
    """

    body: torch.Tensor
    tier_bytes: dict[Tier, int]


class Codec(Protocol):
    """Turns tensors into bytes and back, at a precision per token."""

    name: str
    version: int
    tiers: frozenset[Tier]
    """The tiers that this codec can write."""

    def encode(
        self, keys: torch.Tensor, values: torch.Tensor, tiers: torch.Tensor, geometry: KvGeometry
    ) -> EncodedBlock:
        """Code `n` tokens.

        Args:
            keys: `[kv_heads, n, head_dim]` in `geometry.native_dtype`, any strides.
            values: like `keys`.
            tiers: uint8 `[n]` on the CPU.
            geometry: shape and dtype of the model's cache.

        Raises:
            InvalidArgumentError: an element is infinite, NaN or too large for its tier.
        """
        ...

    def decode(
        self,
        body: torch.Tensor,
        tiers: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        geometry: KvGeometry,
    ) -> dict[Tier, int]:
        """Write the tokens of `body` into `keys` and `values`; leave dropped tokens' elements alone.

        Args:
            body: uint8 `[b]` on the CPU, as `encode` made it; it may be read-only.
            tiers: uint8 `[n]` on the CPU.
            keys: `[kv_heads, n, head_dim]` in `geometry.native_dtype`, any strides, on any device: a view
                of the KV slots.
            values: like `keys`.
            geometry: shape and dtype of the model's cache.

        Returns:
            How many bytes of `body` each tier took, as in `EncodedBlock.tier_bytes`.

        Raises:
            DataLossError: the codec cannot write one of the tiers, the body's length does not fit them, or a
                scale is not finite.
        """
        ...


codecs: Registry[Codec] = Registry("codec")
