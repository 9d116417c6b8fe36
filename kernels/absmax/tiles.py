"""How the tokens of segments are dealt out to a GPU's programs, so that one launch codes any mix of tiers.

A tile is a few tokens of one tier of one segment; a program codes a tile in one KV head, on one side (keys or
values).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch

from spectrumkv.kernels.absmax.layout import TIER_16BIT, TIER_DROP, TIER_INT4, TIER_INT8, section_bytes

# What a tile's row of the table says, in this order; one column is left, so that a row has 32 bytes.
TILE_COLUMNS = 8
TIER, I64, ROWS, ROW, SECTION_ROWS, ELEMENTS_AT, SCALES_AT = range(7)


@dataclass(frozen=True, eq=False)
class TileTable:
    """What each program does.

    Attributes:
        order: int32 `[m]`, tokens, those of a tile side by side.
        tiles: int32 `[t, TILE_COLUMNS]`, for each tile: its tier; the place in `order` of its first token; how many
            there are; the first one's row in its section; the rows of the section in one head; the bytes at which the
            sections of the elements and of the scales begin.
    """

    order: np.ndarray
    tiles: np.ndarray

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Both arrays on a device, by one copy."""
        both = torch.from_numpy(np.concatenate((self.tiles.ravel(), self.order)))
        if device.type == "cuda":
            both = both.pin_memory().to(device, non_blocking=True)
        return both[self.tiles.size :], both[: self.tiles.size]


def tiles_of_segments(
    tiers: np.ndarray, cuts: Sequence[int], kv_heads: int, head_dim: int, tile_rows: int
) -> TileTable:
    """Deal out segments whose bodies lie back to back.

    Args:
        tiers: uint8 `[n]`, codes of the wire's tier map.
        cuts: the first token of each segment, rising from 0, and n.
        kv_heads: of the model.
        head_dim: of the model.
        tile_rows: most tokens of a tile.
    """
    order, tiles, body_at = [], [], 0
    for first, end in pairwise(cuts):
        segment = tiers[first:end]
        order.append(np.argsort(segment, kind="stable") + first)
        counts = np.bincount(segment, minlength=TIER_16BIT + 1).tolist()
        places = [first + before for before in accumulate(counts, initial=0)]
        sizes = section_bytes(counts[TIER_16BIT], counts[TIER_INT8], counts[TIER_INT4], kv_heads, head_dim)
        *starts, body_at = accumulate(sizes, initial=body_at)
        sections = {TIER_16BIT: (starts[0], 0), TIER_INT8: (starts[3], starts[1]), TIER_INT4: (starts[4], starts[2])}
        for tier, (elements_at, scales_at) in sections.items():
            if counts[tier]:
                tiles.append(_section(tier, places[tier], counts[tier], elements_at, scales_at, tile_rows))
    empty = np.empty((0, TILE_COLUMNS), np.int32)
    return TileTable(np.concatenate(order).astype(np.int32), np.concatenate([empty, *tiles]))


def _section(tier: int, place: int, rows: int, elements_at: int, scales_at: int, tile_rows: int) -> np.ndarray:
    assert tier != TIER_DROP
    row = np.arange(0, rows, tile_rows, dtype=np.int32)
    tiles = np.zeros((row.size, TILE_COLUMNS), np.int32)
    tiles[:, TIER] = tier
    tiles[:, I64] = place + row
    tiles[:, ROWS] = np.minimum(tile_rows, rows - row)
    tiles[:, ROW] = row
    tiles[:, SECTION_ROWS] = rows
    tiles[:, ELEMENTS_AT] = elements_at
    tiles[:, SCALES_AT] = scales_at
    return tiles
