"""The precision spectrum: which tiers there are, what they cost, how a map of them is packed."""

from enum import IntEnum

import numpy as np
import torch

from spectrumkv.kernels.tiers import TIER_16BIT, TIER_DROP, TIER_INT4, TIER_INT8, TIER_NATIVE, tier_counts

# A tier map has two bits a token (proto/spectrumkv/v1/kv.proto).
TIER_MAP_BITS = 2
TIER_MAP_MASK = (1 << TIER_MAP_BITS) - 1
TOKENS_PER_TIER_MAP_BYTE = 8 // TIER_MAP_BITS
_TIER_SHIFTS = np.arange(0, 8, TIER_MAP_BITS, dtype=np.uint8)
# uint8 `[256, 4]`: the four tiers of each byte of a map.
_TIERS_OF_BYTE = (np.arange(256, dtype=np.uint8)[:, None] >> _TIER_SHIFTS) & TIER_MAP_MASK


class Tier(IntEnum):
    """The precision that one token's keys and values are sent at.

    The values are the codes that segments have on the wire; of these a tier map has the first four, in two bits each.
    The protocol's enum counts from 1, because 0 stands for "unspecified" there; `wire_name` is the tier's name in it.
    """

    DROP = TIER_DROP
    INT4 = TIER_INT4
    INT8 = TIER_INT8
    FP16 = TIER_16BIT
    NATIVE = TIER_NATIVE

    @property
    def label(self) -> str:
        """Return the tier's name in metrics, tables and JSON."""
        return self.name.lower()

    @property
    def wire_name(self) -> str:
        """Return the tier's name in the protocol's enum `Tier` (proto/spectrumkv/v1/kv.proto)."""
        return f"TIER_{self.name}"

    @property
    def nominal_cost(self) -> float:
        """Look up the paper's cost relative to FP16, scales and framing left out. NATIVE counts as FP16."""
        return _NOMINAL_COST[self]


_NOMINAL_COST = {Tier.DROP: 0.0, Tier.INT4: 0.25, Tier.INT8: 0.5, Tier.FP16: 1.0, Tier.NATIVE: 1.0}


def count_tiers(tiers: torch.Tensor) -> dict[Tier, int]:
    """Count the tokens of each tier.

    Args:
        tiers: uint8 `[...]` on the CPU, `Tier` values.

    Returns:
        A count for every tier, 0 included.
    """
    # numpy, as elsewhere in this file: an operation takes a fraction of torch's time over so few bytes.
    return dict(zip(Tier, tier_counts(tiers.numpy().ravel()), strict=True))


def pack_tier_map(tiers: torch.Tensor) -> bytes:
    """Pack tiers two bits each, token i in bits 2·(i mod 4) of byte i div 4, to an even number of bytes.

    Args:
        tiers: uint8 `[n]` on the CPU with values 0 to 3.

    Returns:
        `tier_map_bytes(n)` bytes.
    """
    padded = np.zeros((tier_map_bytes(tiers.numel()), TOKENS_PER_TIER_MAP_BYTE), np.uint8)
    padded.ravel()[: tiers.numel()] = tiers.numpy()
    packed: np.ndarray = (padded << _TIER_SHIFTS).sum(axis=1, dtype=np.uint8)
    return packed.tobytes()


def tier_map_bytes(tokens: int) -> int:
    """Return the bytes of the packed map of `tokens` tokens."""
    return -(-tokens // 8) * 2


def unpack_tier_map(packed: torch.Tensor, tokens: int) -> torch.Tensor:
    """Unpack a tier map: the inverse of `pack_tier_map`.

    Args:
        packed: uint8 `[tier_map_bytes(tokens)]` on the CPU.
        tokens: how many tokens the map holds.

    Returns:
        uint8 `[tokens]`.
    """
    return torch.from_numpy(_TIERS_OF_BYTE[packed.numpy()].ravel()[:tokens])
