"""Copies between states with any strides and the bodies of segments, in Triton: one launch for a layer.

What is copied is bits, and while they pass it is noted whether they are those of a finite number.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
import triton
import triton.language as tl

from spectrumkv.kernels.triton_shared import Jit, jit
from spectrumkv.kernels.upload import aligned, states_offset, upload

# Elements of one program: enough to keep 128 threads busy, few enough to stay in registers.
PROGRAM_ELEMENTS = 4096
SIDES = 2
# The bits of an infinity in each dtype; a NaN has them all and others.
INFINITY_BITS = {torch.float32: 0x7F800000, torch.float16: 0x7C00, torch.bfloat16: 0x7F80}
_BITS = {4: torch.int32, 2: torch.int16}

# What is told of each token: the first one of its segment, how many that has, the element at which its body begins,
# and `STATES_AT` (see `tier_placement.layout`).
COLUMNS = tl.constexpr(4)

# A kernel of its own for each divisor of a prompt's length would be compiled while a request waits.
_jit_for_any_prompt: Jit = triton.jit(do_not_specialize=["tokens"])


@jit
def _copy_rows(
    states_ptr: tl.tensor,
    stride_head: tl.tensor,
    stride_token: tl.tensor,
    stride_element: tl.tensor,
    places_ptr: tl.tensor,
    bodies_ptr: tl.tensor,
    broken_ptr: tl.tensor,
    tokens: tl.tensor,
    kv_heads: tl.tensor,
    encodes: tl.constexpr,
    infinity: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    rows: tl.constexpr,
) -> None:
    """Copy a few tokens of one KV head and side, and write whether one of their elements is infinite or NaN."""
    token = tl.program_id(0) * rows + tl.arange(0, rows)
    there = token < tokens
    element = tl.arange(0, padded_dim)[None, :]
    mask = there[:, None] & (element < head_dim)
    place_ptr = places_ptr + token * COLUMNS
    first, held = tl.load(place_ptr, mask=there, other=0), tl.load(place_ptr + 1, mask=there, other=0)
    body_at = tl.load(place_ptr + 2, mask=there, other=0)
    states_at = tl.load(place_ptr + 3, mask=there, other=0)
    head = (tl.program_id(2) * kv_heads + tl.program_id(1)).to(tl.int64)
    body_ptr = bodies_ptr + (body_at + (head * held + token - first) * head_dim)[:, None] + element
    token_at = states_at + token.to(tl.int64) * stride_token
    state_ptr = states_ptr + tl.program_id(1).to(tl.int64) * stride_head + token_at[:, None]
    state_ptr += element.to(tl.int64) * stride_element
    if encodes:
        bits = tl.load(state_ptr, mask=mask, other=0)
        tl.store(body_ptr, bits, mask=mask)
        is_broken = ((bits.to(tl.int32) & infinity) == infinity).to(tl.int32)
        program = (tl.program_id(0) * kv_heads + tl.program_id(1)) * 2 + tl.program_id(2)
        tl.store(broken_ptr + program, tl.max(tl.max(is_broken, axis=1), axis=0).to(tl.uint8))
    else:
        tl.store(state_ptr, tl.load(body_ptr, mask=mask, other=0), mask=mask)


@_jit_for_any_prompt
def native_kernel(
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    key_stride_head: tl.tensor,
    key_stride_token: tl.tensor,
    key_stride_element: tl.tensor,
    value_stride_head: tl.tensor,
    value_stride_token: tl.tensor,
    value_stride_element: tl.tensor,
    places_ptr: tl.tensor,
    bodies_ptr: tl.tensor,
    broken_ptr: tl.tensor,
    tokens: tl.tensor,
    kv_heads: tl.tensor,
    encodes: tl.constexpr,
    infinity: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    rows: tl.constexpr,
) -> None:
    """Copy this program's tokens on its side. The grid is (token runs, KV heads, sides)."""
    if tl.program_id(2) == 0:
        _copy_rows(
            keys_ptr, key_stride_head, key_stride_token, key_stride_element, places_ptr, bodies_ptr, broken_ptr,
            tokens, kv_heads, encodes, infinity, head_dim, padded_dim, rows,
        )  # fmt: skip
    else:
        _copy_rows(
            values_ptr, value_stride_head, value_stride_token, value_stride_element, places_ptr, bodies_ptr,
            broken_ptr, tokens, kv_heads, encodes, infinity, head_dim, padded_dim, rows,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class CodedLayer:
    """All that the host needs of a layer, in one piece of memory, so that one copy brings it there.

    Attributes:
        memory: uint8, on the GPU or on the host.
        body_bytes: of all bodies, which come first.
    """

    memory: torch.Tensor
    body_bytes: int

    def copied(self, memory: torch.Tensor) -> "CodedLayer":
        """Return the layer in other memory, into which its own was copied: uint8 `[bytes]` on the host."""
        return CodedLayer(memory, self.body_bytes)

    @property
    def bodies(self) -> torch.Tensor:
        """Show the segments' bodies, back to back: uint8 `[body_bytes]`."""
        return self.memory[: self.body_bytes]

    @property
    def broken(self) -> torch.Tensor:
        """Show a byte for each program, 0 where all that it copied was finite: uint8 `[programs]`."""
        return self.memory[aligned(self.body_bytes) :]


def encode(keys: torch.Tensor, values: torch.Tensor, boundaries: Sequence[int]) -> CodedLayer:
    """Copy a layer's states into the bodies of its segments: keys, then values, `[2, kv_heads, tokens, head_dim]`.

    CPU tensors work under `TRITON_INTERPRET=1` only.

    Args:
        keys: float32, float16 or bfloat16 `[kv_heads, n, head_dim]`, any strides.
        values: like `keys`.
        boundaries: the first token of each segment, rising from 0, and n.

    Returns:
        The layer, on the device of the keys.
    """
    size, programs = 2 * keys.nbytes, _programs(keys) * keys.shape[0] * SIDES
    layer = CodedLayer(torch.empty(aligned(size) + programs, dtype=torch.uint8, device=keys.device), size)
    token_elements = 2 * keys.shape[0] * keys.shape[2]
    bodies_at = [first * token_elements for first in boundaries[:-1]]
    (places,) = upload((_places(boundaries, bodies_at, [0] * len(bodies_at)),), keys.device)
    _launch(keys, values, places, layer.bodies, layer.broken, encodes=True)
    return layer


def decode(bodies: Sequence[torch.Tensor], slots: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy the bodies of segments of any layers into slots, by one copy to the device and one launch.

    Args:
        bodies: uint8 on the CPU, at any addresses, one for each segment.
        slots: keys and values of each segment, `[kv_heads, n, head_dim]`, views of one cache; written.
    """
    keys, values = slots[0]
    ends = list(accumulate((of_segment.shape[1] for of_segment, _ in slots), initial=0))
    bodies_at = list(accumulate((aligned(body.numel()) for body in bodies), initial=0))
    states_at = [
        states_offset(slots[0], one) - first * keys.stride(1) for one, first in zip(slots, ends, strict=False)
    ]
    places = _places(ends, [at // keys.itemsize for at in bodies_at[:-1]], states_at)
    there = upload((places, *bodies), keys.device)
    # They lie one after another, each at a multiple of the alignment.
    arrived = there[1].as_strided((bodies_at[-1],), (1,))
    _launch(keys, values, there[0], arrived, arrived, encodes=False)


def _places(boundaries: Sequence[int], bodies_at: Sequence[int], states_at: Sequence[int]) -> torch.Tensor:
    """Return int64 `[n, COLUMNS]`, what the kernel is told of each token."""
    lengths = [end - first for first, end in pairwise(boundaries)]
    of_segments = np.stack([boundaries[:-1], lengths, bodies_at, states_at], axis=1).astype(np.int64)
    return torch.from_numpy(np.repeat(of_segments, lengths, axis=0))


def _rows(head_dim: int) -> int:
    """Return the tokens of a program."""
    return max(1, PROGRAM_ELEMENTS // int(triton.next_power_of_2(head_dim)))


def _programs(keys: torch.Tensor) -> int:
    """Return the programs of one KV head and side."""
    _, tokens, head_dim = keys.shape
    return -(-tokens // _rows(head_dim))


def _launch(
    keys: torch.Tensor,
    values: torch.Tensor,
    places: torch.Tensor,
    bodies: torch.Tensor,
    broken: torch.Tensor,
    encodes: bool,
) -> None:
    kv_heads, _, head_dim = keys.shape
    tokens = places.shape[0]
    bits = _BITS[keys.itemsize]
    with torch.cuda.device(keys.get_device()):
        native_kernel[-(-tokens // _rows(head_dim)), kv_heads, SIDES](
            keys.view(bits),
            values.view(bits),
            *keys.stride(),
            *values.stride(),
            places,
            bodies.view(bits),
            broken,
            tokens,
            kv_heads,
            encodes=encodes,
            infinity=INFINITY_BITS[keys.dtype],
            head_dim=head_dim,
            padded_dim=int(triton.next_power_of_2(head_dim)),
            rows=_rows(head_dim),
        )
