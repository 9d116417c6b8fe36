"""Bodies of a message to slots on a GPU: one copy there, and two launches, however many segments and layers it has.

The host derives the layout of each segment, since it has to check it; what kernels need of that travels with the
bodies.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
import triton

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
from spectrumkv.kernels.fixed_rate.triton import unpacking
from spectrumkv.kernels.fixed_rate.triton.encode import BLOCK_GROUPS, LEAST_DIM, tile_of
from spectrumkv.kernels.fixed_rate.triton.synthesis import TILE_COLUMNS, _synthesise_kernel
from spectrumkv.kernels.fixed_rate.triton.tables import SynthesisTables, quantizer_tables
from spectrumkv.kernels.fixed_rate.triton.unpacking import TOKEN_COLUMNS, _unpack_kernel
from spectrumkv.kernels.upload import aligned, states_offset, upload

# Escapes of a token that are looked at together.
BLOCK_ESCAPES = 32
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
        slots: keys and values of each, `[kv_heads, n, head_dim]`, views of one cache; written.
        angles: cosine and sine, float32 `[kinds, positions, head_dim / 2]`; see `tables.Angles`.
        tables: of the basis.
    """
    keys, values = slots[0]
    kv_heads, _, head_dim = keys.shape
    rows = 2 * kv_heads * head_dim
    groups = -(-rows // GROUP_ROWS)
    coded = [one for one in segments if one.scales is not None]
    tokens = sum(one.coded for one in coded)
    # Bodies come first, so that where they lie is known.
    bodies_at = list(accumulate((aligned(one.body.numel()) for one in segments), initial=0))
    tables_of_rows = _tables_of_rows(coded)
    tile_tokens, tile_coefficients = tile_of(head_dim)
    parts = (
        *(one.body for one in segments),
        torch.from_numpy(_token_table(segments, bodies_at, rows)),
        torch.from_numpy(_tile_table(segments, slots, bodies_at, tile_tokens)),
        *map(torch.from_numpy, tables_of_rows),
    )
    there = upload(parts, keys.device)
    of_tokens, tiles, order, group_exponents, means, spreads = there[len(segments) :]
    # They lie one after another, each at a multiple of the alignment.
    bodies = there[0].as_strided((bodies_at[-1],), (1,))
    coefficients = torch.empty(max(tokens, 1), rows, dtype=torch.float32, device=keys.device)
    half_dtype = torch.float16 if keys.dtype == torch.float32 else keys.dtype
    table = quantizer_tables(keys.device)
    with torch.cuda.device(keys.get_device()):
        if tokens:
            _unpack_kernel[(tokens,)](
                bodies.view(torch.int32),
                of_tokens,
                order,
                group_exponents,
                means,
                spreads,
                coefficients,
                table.level,
                table.thresholds,
                rows=rows,
                groups=groups,
                block_groups=BLOCK_GROUPS,
                block_escapes=BLOCK_ESCAPES,
            )
        _synthesise_kernel[tiles.shape[0], 2 * kv_heads](
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
            padded_half=max(LEAST_DIM, triton.next_power_of_2(head_dim // 2)),
            block_tokens=tile_tokens,
            block_columns=tile_coefficients,
        )


def _tables_of_rows(coded: Sequence[ReceivedSegment]) -> tuple[np.ndarray, ...]:
    """Return order int32, group exponents int32, and means and spreads in that order, float32, of all segments.

    Returns:
        Arrays of at least one element.
    """
    scales = [one.scales for one in coded if one.scales is not None]
    if not scales:
        return np.zeros(1, np.int32), np.zeros(1, np.int32), np.zeros(1, np.float32), np.zeros(1, np.float32)
    return (
        np.concatenate([one.order for one in scales]).astype(np.int32),
        np.concatenate([one.group_exponents for one in scales]).astype(np.int32),
        np.concatenate([one.mean[one.order] for one in scales]),
        np.concatenate([one.spread[one.order] for one in scales]),
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


def _tile_table(
    segments: Sequence[ReceivedSegment],
    slots: Sequence[tuple[torch.Tensor, torch.Tensor]],
    bodies_at: Sequence[int],
    tile_tokens: int,
) -> np.ndarray:
    """Return int64 `[tiles, TILE_COLUMNS]`, what the kernel is told of each tile: sinks, then the other tokens."""
    tiles, line = [], 0
    token_stride = slots[0][0].stride(1)
    for one, states, body_at in zip(segments, slots, bodies_at, strict=False):
        states_at, sinks_at = states_offset(slots[0], states), (body_at + one.sinks_at) // 2
        for first in range(0, one.sinks, tile_tokens):
            count = min(tile_tokens, one.sinks - first)
            at = states_at + first * token_stride
            head_dim = slots[0][0].shape[2]
            tiles.append((one.layer, 0, 0, -1, sinks_at + first * head_dim, one.sinks, count, at))
        for first in range(0, one.coded, tile_tokens):
            token = one.sinks + first
            count, position = min(tile_tokens, one.coded - first), one.first_token + token
            at = states_at + token * token_stride
            tiles.append((one.layer, one.kind, position, line + first, sinks_at, one.sinks, count, at))
        line += one.coded
    table = np.array(tiles, np.int64)
    assert table.shape[1] == TILE_COLUMNS
    return table
