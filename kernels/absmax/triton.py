"""Absmax quantization on GPUs: tensors in, one launch of the kernel in `triton_kernels`.

Tiers and places come from the host, or from a kernel that ranks scores (`tier_placement`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
import triton

from spectrumkv.kernels.absmax import triton_kernels
from spectrumkv.kernels.absmax.layout import section_offsets, token_bytes
from spectrumkv.kernels.body import BodyLayout, Section
from spectrumkv.kernels.tier_placement import SegmentRoom, TierRanks, placement_of
from spectrumkv.kernels.tier_placement.layout import SEGMENT_COLUMNS
from spectrumkv.kernels.tier_placement.triton import rank_and_place
from spectrumkv.kernels.tiers import TIER_DROP
from spectrumkv.kernels.upload import aligned, states_offset, upload

# Elements of one program: enough to keep 128 threads busy, few enough to stay in registers.
PROGRAM_ELEMENTS = 2048
SIDES = 2


@dataclass(frozen=True, eq=False)
class CodedLayer:
    """All that the host needs of a coded layer, in one piece of memory, so that one copy brings it there.

    Attributes:
        body_bytes: of all bodies.
        programs: that coded the layer.
        segments: rows of the table; 0 where the host has it.
        ranked_tokens: tokens whose tiers are here; 0 where the host has them.
        memory: uint8, on the GPU or on the host.
    """

    body_bytes: int
    programs: int
    segments: int
    ranked_tokens: int
    memory: torch.Tensor

    @classmethod
    def of(cls, keys: torch.Tensor, body_bytes: int, segments: int, ranked_tokens: int) -> "CodedLayer":
        """Obtain the memory of a layer on its device.

        Args:
            keys: of the layer, `[kv_heads, n, head_dim]`.
            body_bytes: see the class, like the others.
            segments: most segments that the layer can have.
            ranked_tokens: n, or 0.

        Returns:
            The layer; its memory holds nothing yet.
        """
        programs = _programs(keys) * keys.shape[0] * SIDES
        size = _layer_layout(body_bytes, programs, segments, ranked_tokens).bytes
        memory = torch.empty(size, dtype=torch.uint8, device=keys.device)
        return cls(body_bytes, programs, segments, ranked_tokens, memory)

    def copied(self, memory: torch.Tensor) -> "CodedLayer":
        """Return the layer in other memory, into which its own was copied: uint8 `[bytes]` on the host."""
        return replace(self, memory=memory)

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        """Show what was found, segments, bodies, broken and tiers, as views of the memory.

        Returns:
            int64 `[2]`, see `rank_and_place`; int64 `[s, SEGMENT_COLUMNS]`; uint8 `[body_bytes]`; uint8 `[programs]`,
            1 where a program met something that its tier cannot hold; and uint8 `[n]`.
        """
        layout = _layer_layout(self.body_bytes, self.programs, self.segments, self.ranked_tokens)
        found, segments, bodies, broken, tiers = layout.arrays(self.memory)
        return found, segments, bodies[: self.body_bytes], broken[: self.programs], tiers


def _layer_layout(body_bytes: int, programs: int, segments: int, ranked_tokens: int) -> BodyLayout:
    """Lay out the memory of a `CodedLayer`.

    Returns:
        The layout; bodies and flags are padded, so that what follows them is aligned.
    """
    sections = (
        ((2 if segments else 0,), torch.int64),
        ((segments, SEGMENT_COLUMNS), torch.int64),
        ((aligned(body_bytes),), torch.uint8),
        ((aligned(programs),), torch.uint8),
        ((ranked_tokens,), torch.uint8),
    )
    return BodyLayout(tuple(Section(TIER_DROP, shape, dtype) for shape, dtype in sections))


def encode_ranked(
    keys: torch.Tensor, values: torch.Tensor, scores: torch.Tensor, ranks: TierRanks, room: SegmentRoom
) -> CodedLayer:
    """Code a layer at the tiers that its tokens' scores give them; see `dispatch.encode_ranked`.

    Returns:
        The layer, on the device.
    """
    layer = CodedLayer.of(keys, room.body_bytes(ranks), room.most_segments(ranks), ranks.tokens)
    found, segments, bodies, broken, tiers = layer.parts
    places = torch.empty(2, ranks.tokens, dtype=torch.int32, device=keys.device)
    rank_and_place(scores, ranks, room, found, segments, places, tiers)
    _launching(triton_kernels.encode_rows, keys, values, (tiers, places, segments), bodies, broken)()
    return layer


def encode_tiers(
    keys: torch.Tensor, values: torch.Tensor, tiers: torch.Tensor, boundaries: Sequence[int], body_bytes: int
) -> CodedLayer:
    """Code a layer whose tiers the host knows; see `dispatch.encode_tiers`.

    Returns:
        The layer, on the device; without segments and tiers, which the host has.
    """
    layer = CodedLayer.of(keys, body_bytes, segments=0, ranked_tokens=0)
    _, _, bodies, broken, _ = layer.parts
    tables = _uploaded(keys, tiers, boundaries)
    _launching(triton_kernels.encode_rows, keys, values, tables, bodies, broken)()
    return layer


def encode(
    keys: torch.Tensor, values: torch.Tensor, tiers: torch.Tensor, boundaries: Sequence[int], bodies: torch.Tensor
) -> None:
    """Code segments of tokens; see `dispatch.encode`. CPU tensors work under `TRITON_INTERPRET=1` only."""
    encoding(keys, values, tiers, boundaries, bodies)()


def decode(
    bodies: torch.Tensor, tiers: torch.Tensor, boundaries: Sequence[int], keys: torch.Tensor, values: torch.Tensor
) -> None:
    """Write the tokens of segments; see `dispatch.decode`. CPU tensors work under `TRITON_INTERPRET=1` only."""
    decoding(bodies, tiers, boundaries, keys, values)()


def decode_segments(
    bodies: Sequence[torch.Tensor],
    tiers: Sequence[torch.Tensor],
    slots: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> None:
    """Write the tokens of segments of any layers; see `dispatch.decode_segments`."""
    keys, values = slots[0]
    kv_heads, _, head_dim = keys.shape
    ends = list(accumulate((one.numel() for one in tiers), initial=0))
    bodies_at = list(accumulate((aligned(body.numel()) for body in bodies), initial=0))
    states_at = [
        states_offset(slots[0], one) - first * keys.stride(1) for one, first in zip(slots, ends, strict=False)
    ]
    of_tokens = torch.cat(list(tiers))
    taken = token_bytes(kv_heads, head_dim)
    placed = placement_of(of_tokens.numpy(), ends, taken, bodies_at[:-1], states_at)
    tables = (of_tokens, torch.from_numpy(placed.places), torch.from_numpy(placed.segments))
    there = upload((*tables, *bodies), keys.device)
    # They lie one after another, each at a multiple of the alignment.
    arrived = there[len(tables)].as_strided((bodies_at[-1],), (1,))
    _launching(triton_kernels.decode_rows, keys, values, tuple(there[:3]), arrived, arrived)()


def encoding(
    keys: torch.Tensor, values: torch.Tensor, tiers: torch.Tensor, boundaries: Sequence[int], bodies: torch.Tensor
) -> Callable[[], None]:
    """Return what runs `encode` with these arguments: one launch and nothing else, as CUDA graphs want it."""
    tables = _uploaded(keys, tiers, boundaries)
    broken = torch.empty(_programs(keys) * keys.shape[0] * SIDES, dtype=torch.uint8, device=keys.device)
    return _launching(triton_kernels.encode_rows, keys, values, tables, bodies, broken)


def decoding(
    bodies: torch.Tensor, tiers: torch.Tensor, boundaries: Sequence[int], keys: torch.Tensor, values: torch.Tensor
) -> Callable[[], None]:
    """Return what runs `decode` with these arguments; see `encoding`."""
    tables = _uploaded(keys, tiers, boundaries)
    return _launching(triton_kernels.decode_rows, keys, values, tables, bodies, bodies)


def _rows(head_dim: int) -> int:
    """Return the tokens of a program."""
    return max(1, PROGRAM_ELEMENTS // (2 * int(triton.next_power_of_2(head_dim // 2))))


def _programs(keys: torch.Tensor) -> int:
    """Return the programs of one KV head and side."""
    _, tokens, head_dim = keys.shape
    return -(-tokens // _rows(head_dim))


def _uploaded(keys: torch.Tensor, tiers: torch.Tensor, boundaries: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """Return tiers, places and segments on the device of the keys."""
    kv_heads, _, head_dim = keys.shape
    placed = placement_of(tiers.numpy(), boundaries, token_bytes(kv_heads, head_dim))
    tables = (tiers, torch.from_numpy(placed.places), torch.from_numpy(placed.segments))
    return tuple(upload(tables, keys.device))


@lru_cache(maxsize=16)
def _section_offsets_on(device: torch.device, kv_heads: int, head_dim: int) -> torch.Tensor:
    return torch.from_numpy(section_offsets(kv_heads, head_dim)).to(device)


def _launching(
    code_rows: Any,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: tuple[torch.Tensor, ...],
    bodies: torch.Tensor,
    broken: torch.Tensor,
) -> Callable[[], None]:
    """Return what runs `code_rows` on all tokens that have tiers, KV heads and sides."""
    kv_heads, _, head_dim = keys.shape
    tokens = tables[0].numel()
    half_dtype = torch.float16 if keys.dtype == torch.float32 else keys.dtype
    floats, scales = bodies.view(half_dtype), bodies.view(torch.float16)
    offsets = _section_offsets_on(keys.device, kv_heads, head_dim)

    def launch() -> None:
        with torch.cuda.device(keys.get_device()):
            triton_kernels.absmax_kernel[-(-tokens // _rows(head_dim)), kv_heads, SIDES](
                keys,
                values,
                *keys.stride(),
                *values.stride(),
                *tables,
                offsets,
                floats,
                scales,
                bodies,
                broken,
                tokens,
                kv_heads,
                code_rows=code_rows,
                half=head_dim // 2,
                padded_half=int(triton.next_power_of_2(head_dim // 2)),
                # Every section has a length that both of these divide, so that each begins at a multiple of them.
                alignment=math.gcd(16, (4 if head_dim % 4 == 0 else 2) * kv_heads),
                rows=_rows(head_dim),
            )

    return launch
