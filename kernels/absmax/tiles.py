"""How the tokens of segments are dealt out to a GPU's programs, so that one launch codes any mix of tiers.

A tile is a few tokens of one tier of one segment; a program codes a tile in one KV head, on one side (keys or
values).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch

from spectrumkv.kernels.absmax.layout import FORMATS, PLACES, body_layout
from spectrumkv.kernels.tiers import TIER_16BIT, tier_counts

# What a tile's row of the table says, in this order; one column is left, so that a row has 32 bytes.
TILE_COLUMNS = 8
TIER, ORDER_START, ROWS, ROW, SECTION_ROWS, ELEMENTS_AT, SCALES_AT = range(7)
# Which sections hold the elements and the scales of a tier. Elements at 16 bits have no scales: any section will do.
SECTIONS_OF_TIER = {
    TIER_16BIT: (PLACES.floats, PLACES.floats),
    **{tier: PLACES.coded(form) for tier, form in FORMATS.items()},
}


@dataclass(frozen=True, eq=False)
class TileTable:
    """A table that tells each program of a launch what it codes.

    Attributes:
        order: int32 `[m]`, tokens, those of a tile side by side.
        tiles: int32 `[t, TILE_COLUMNS]`, for each tile: its tier; the index in `order` of its first token; how many
            there are; the first one's row in its section; the rows of the section in one head; the bytes at which the
            sections of the elements and of the scales begin.
    """

    order: np.ndarray
    tiles: np.ndarray

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return both arrays on a device, by one copy."""
        both = torch.from_numpy(np.concatenate((self.tiles.ravel(), self.order)))
        if device.type == "cuda":
            both = both.pin_memory().to(device, non_blocking=True)
        return both[self.tiles.size :], both[: self.tiles.size]


def tiles_of_segments(
    tiers: np.ndarray, boundaries: Sequence[int], kv_heads: int, head_dim: int, tile_rows: int
) -> TileTable:
    """Deal out segments whose bodies lie back to back.

    Args:
        tiers: uint8 `[n]`, codes of the wire's tier map.
        boundaries: the first token of each segment, rising from 0, and n.
        kv_heads: of the model.
        head_dim: of the model.
        tile_rows: most tokens of a tile.

    Returns:
        The tiles, segment by segment.
    """
    order, tiles, body_at = [], [], 0
    for first, end in pairwise(boundaries):
        segment = tiers[first:end]
        order.append(np.argsort(segment, kind="stable") + first)
        counts = tier_counts(segment)
        starts = [first + before for before in accumulate(counts, initial=0)]
        # Offsets do not depend on which 16-bit dtype the model has.
        offsets = body_layout(counts, kv_heads, head_dim, torch.float16).offsets
        for tier, (elements, scales) in SECTIONS_OF_TIER.items():
            if counts[tier]:
                addresses = body_at + offsets[elements], body_at + offsets[scales]
                tiles.append(_tiles_of_section(tier, starts[tier], counts[tier], *addresses, tile_rows))
        body_at += offsets[-1]
    empty = np.empty((0, TILE_COLUMNS), np.int32)
    return TileTable(np.concatenate(order).astype(np.int32), np.concatenate([empty, *tiles]))


def _tiles_of_section(
    tier: int, order_start: int, rows: int, elements_at: int, scales_at: int, tile_rows: int
) -> np.ndarray:
    """Return the tiles of one tier's tokens in one segment: int32 `[t, TILE_COLUMNS]`."""
    row = np.arange(0, rows, tile_rows, dtype=np.int32)
    tiles = np.zeros((row.size, TILE_COLUMNS), np.int32)
    tiles[:, TIER] = tier
    tiles[:, ORDER_START] = order_start + row
    tiles[:, ROWS] = np.minimum(tile_rows, rows - row)
    tiles[:, ROW] = row
    tiles[:, SECTION_ROWS] = rows
    tiles[:, ELEMENTS_AT] = elements_at
    tiles[:, SCALES_AT] = scales_at
    return tiles
