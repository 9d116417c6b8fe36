"""Bodies of a message to slots on a GPU: one copy there, and two launches, however many segments and layers it has.

The host derives the layout of each segment, since it has to check it; what kernels need of that travels with the
bodies.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

from spectrumkv.kernels.fixed_rate.layout import (
    BASE_UNITS,
    GROUP_ROWS,
    LOWEST_PROFILE,
    PROFILE_UNITS,
    PROFILES,
    RATIO_UNITS,
    RecordLayout,
    RowScales,
    gain_of_byte,
)
from spectrumkv.kernels.fixed_rate.triton.decoding import unpacking
from spectrumkv.kernels.fixed_rate.triton.decoding.synthesis import TILE_COLUMNS, synthesise_kernel
from spectrumkv.kernels.fixed_rate.triton.decoding.unpacking import TOKEN_COLUMNS, unpack_kernel
from spectrumkv.kernels.fixed_rate.triton.tables import SynthesisTables, quantizer_tables
from spectrumkv.kernels.fixed_rate.triton.tiles import BLOCK_GROUPS, padded_half, tile_of
from spectrumkv.kernels.upload import aligned, states_offset, upload

# Escapes of a token that are looked at together.
BLOCK_ESCAPES = 32
# Coefficients that lie on the GPU at a time. A message seldom has as many; one of tokens that hardly take bytes could
# have any number.
MOST_COEFFICIENTS = 1 << 24
WORD_BYTES = 4
_GAINS = gain_of_byte(1).view(np.int32)


@dataclass(frozen=True, eq=False)
class ReceivedSegment:
    """A segment whose body was checked, and what the host knows of it.

    Attributes:
        body: uint8 on the CPU, at any address.
        layer: from 0.
        kind: number of the layer's way to turn keys; see `tables.Angles`.
        first_token: position of its first token.
        sinks: how many of its first tokens came as they are, from byte `sinks_at` on.
        sinks_at: byte of the body.
        scales: of the rows; None where all tokens are sinks, as for the next ones.
        tokens: uint8 `[n]`, class and gain of each coded token.
        layout: of the records.
        base: of tokens before `turn`.
        turn: index of a coded token.
        words_at: byte of the body at which records begin; escapes' indices follow, then their values.
        escape_index: uint32 `[e]`, rising.
    """

    body: torch.Tensor
    layer: int
    kind: int
    first_token: int
    sinks: int
    sinks_at: int
    scales: RowScales | None = None
    tokens: np.ndarray | None = None
    layout: RecordLayout | None = None
    base: int = 0
    turn: int = 0
    words_at: int = 0
    escape_index: np.ndarray | None = None

    @property
    def coded(self) -> int:
        """Count the tokens that are no sinks."""
        return 0 if self.tokens is None else len(self.tokens)


def decode(
    segments: Sequence[ReceivedSegment],
    slots: Sequence[tuple[torch.Tensor, torch.Tensor]],
    angles: tuple[torch.Tensor, torch.Tensor],
    tables: SynthesisTables,
) -> None:
    """Write the tokens of segments of any layers into slots. CPU tensors work under `TRITON_INTERPRET=1` only.

    Args:
        segments: at least one.
        slots: keys and values of each, `[kv_heads, n, head_dim]`, views of one cache of the same strides; written.
        angles: cosine and sine, float32 `[kinds, positions, head_dim / 2]`; see `tables.Angles`.
        tables: of the basis.
    """
    keys, values = slots[0]
    assert keys.stride() == values.stride()
    rows = 2 * keys.shape[0] * keys.shape[2]
    tile_tokens, _ = tile_of(keys.shape[2])
    # Bodies come first, so that where they lie is known.
    bodies_at = list(accumulate((aligned(one.body.numel()) for one in segments), initial=0))
    tile_table, batches = _tiles(segments, slots, bodies_at, tile_tokens, max(1, MOST_COEFFICIENTS // rows))
    parts = (
        *(one.body for one in segments),
        torch.from_numpy(_token_table(segments, bodies_at, rows)),
        torch.from_numpy(tile_table),
        *map(torch.from_numpy, _tables_of_rows([one.scales for one in segments if one.scales is not None])),
    )
    there = upload(parts, keys.device)
    of_tokens, tiles, *of_rows = there[len(segments) :]
    # They lie one after another, each at a multiple of the alignment.
    bodies = there[0].as_strided((bodies_at[-1],), (1,))
    most = max(batch.tokens.stop - batch.tokens.start for batch in batches)
    coefficients = torch.empty(max(most, 1), rows, dtype=torch.float32, device=keys.device)
    with torch.cuda.device(keys.get_device()):
        for batch in batches:
            if batch.tokens.stop > batch.tokens.start:
                _unpack(bodies, of_tokens[batch.tokens], of_rows, coefficients)
            _synthesise(bodies, tiles[batch.tiles], coefficients, angles, tables, keys, values)


def _unpack(
    bodies: torch.Tensor, of_tokens: torch.Tensor, of_rows: Sequence[torch.Tensor], coefficients: torch.Tensor
) -> None:
    """Make coefficients of the records of some tokens."""
    table, rows = quantizer_tables(bodies.device), coefficients.shape[1]
    unpack_kernel[(of_tokens.shape[0],)](
        bodies.view(torch.int32),
        of_tokens,
        *of_rows,
        coefficients,
        table.level,
        table.thresholds,
        rows=rows,
        groups=-(-rows // GROUP_ROWS),
        block_groups=BLOCK_GROUPS,
        block_escapes=BLOCK_ESCAPES,
    )


def _synthesise(
    bodies: torch.Tensor,
    tiles: torch.Tensor,
    coefficients: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    tables: SynthesisTables,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """Make keys and values of the coefficients of some tiles, and of their sinks."""
    kv_heads, _, head_dim = keys.shape
    tile_tokens, tile_columns = tile_of(head_dim)
    half_dtype = torch.float16 if keys.dtype == torch.float32 else keys.dtype
    synthesise_kernel[tiles.shape[0], 2 * kv_heads](
        tiles,
        bodies.view(half_dtype),
        coefficients,
        *angles,
        tables.mean,
        tables.synthesis,
        tables.scaling,
        keys,
        values,
        *keys.stride(),
        *values.stride(),
        angles[0].shape[1],
        kv_heads=kv_heads,
        half=head_dim // 2,
        padded_half=padded_half(head_dim),
        block_tokens=tile_tokens,
        block_columns=tile_columns,
    )


def _tables_of_rows(scales: Sequence[RowScales]) -> tuple[np.ndarray, ...]:
    """Return order, group exponents, means and standard deviations of the rows of all segments.

    Returns:
        int32 order and exponents, float32 means and standard deviations in that order; at least one element each.
    """
    if not scales:
        return np.zeros(1, np.int32), np.zeros(1, np.int32), np.zeros(1, np.float32), np.zeros(1, np.float32)
    return (
        np.concatenate([one.order for one in scales]).astype(np.int32),
        np.concatenate([one.group_exponents for one in scales]).astype(np.int32),
        np.concatenate([one.mean[one.order] for one in scales]),
        np.concatenate([one.std[one.order] for one in scales]),
    )


def _token_table(segments: Sequence[ReceivedSegment], bodies_at: Sequence[int], rows: int) -> np.ndarray:
    """Return int32 `[tokens, TOKEN_COLUMNS]`, what the kernel is told of each coded token; one row at least."""
    parts, number = [np.zeros((0, TOKEN_COLUMNS), np.int32)], 0
    for one, body_at in zip(segments, bodies_at, strict=False):
        if one.tokens is None or one.layout is None or one.escape_index is None:
            continue
        count, words_at = len(one.tokens), (body_at + one.words_at) // WORD_BYTES
        part = np.zeros((count, TOKEN_COLUMNS), np.int32)
        token = np.arange(count)
        profile = one.layout.profiles % PROFILES + LOWEST_PROFILE
        steps = one.base + (token >= one.turn)
        first = np.searchsorted(one.escape_index, np.arange(count + 1, dtype=np.int64) * rows)
        index_at = words_at + one.layout.words
        part[:, unpacking.SEGMENT_AT] = number
        part[:, unpacking.WORD_AT] = words_at + one.layout.starts[:-1]
        part[:, unpacking.SHIFT_AT] = (RATIO_UNITS // PROFILE_UNITS) * profile - (RATIO_UNITS // BASE_UNITS) * steps
        part[:, unpacking.INDEX_AT] = index_at + first[:-1]
        part[:, unpacking.VALUE_AT] = index_at + len(one.escape_index) + first[:-1]
        part[:, unpacking.ESCAPES_AT] = np.diff(first)
        part[:, unpacking.FIRST_AT] = token * rows
        part[:, unpacking.GAIN_AT] = _GAINS[one.tokens]
        parts.append(part)
        number += 1
    return np.concatenate(parts if number else [np.zeros((1, TOKEN_COLUMNS), np.int32)])


class _Batch(NamedTuple):
    """Tiles that are written together, and the coded tokens that they need."""

    tiles: slice
    tokens: slice


def _tiles(
    segments: Sequence[ReceivedSegment],
    slots: Sequence[tuple[torch.Tensor, torch.Tensor]],
    bodies_at: Sequence[int],
    tile_tokens: int,
    most_tokens: int,
) -> tuple[np.ndarray, list[_Batch]]:
    """Cut segments into tiles, sinks apart from the other tokens, and these into batches of so many tokens.

    Returns:
        int64 `[tiles, TILE_COLUMNS]`, what the kernel is told of each; and the batches.
    """
    tiles: list[tuple[int, ...]] = []
    batches, first_tile, first_line, line = [], 0, 0, 0
    token_stride, head_dim = slots[0][0].stride(1), slots[0][0].shape[2]
    for one, states, body_at in zip(segments, slots, bodies_at, strict=False):
        states_at, sinks_at = states_offset(slots[0], states), (body_at + one.sinks_at) // 2
        for first in range(0, one.sinks, tile_tokens):
            count, at = min(tile_tokens, one.sinks - first), states_at + first * token_stride
            tiles.append((one.layer, 0, 0, -1, sinks_at + first * head_dim, one.sinks, count, at))
        for first in range(0, one.coded, tile_tokens):
            count, token = min(tile_tokens, one.coded - first), one.sinks + first
            if line + count - first_line > most_tokens and line > first_line:
                batches.append(_Batch(slice(first_tile, len(tiles)), slice(first_line, line)))
                first_tile, first_line = len(tiles), line
            at = states_at + token * token_stride
            tiles.append((one.layer, one.kind, one.first_token + token, line - first_line, 0, 0, count, at))
            line += count
    batches.append(_Batch(slice(first_tile, len(tiles)), slice(first_line, line)))
    table = np.array(tiles, np.int64)
    assert table.shape[1] == TILE_COLUMNS
    return table, batches
