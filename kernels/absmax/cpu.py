"""Absmax quantization on CPUs: tensors in, the compiled loops of `cpu_sides` over their memory.

Importing this module imports numba, a third of a second. Each function compiles at its first call with a dtype, or
loads what an earlier process compiled.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import torch

from spectrumkv.kernels.absmax import cpu_sides as sides
from spectrumkv.kernels.absmax.cpu_rows import greatest_magnitude
from spectrumkv.kernels.absmax.cpu_vectors import ROW_ELEMENTS, streams, whole_vectors
from spectrumkv.kernels.absmax.layout import body_layout, segment_layout
from spectrumkv.kernels.body import BodyLayout
from spectrumkv.kernels.jit.strided import adjacent, flat
from spectrumkv.kernels.tiers import tier_counts

_INFINITY_BITS = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80}


def encode(
    keys: torch.Tensor, values: torch.Tensor, tiers: torch.Tensor, boundaries: Sequence[int], bodies: torch.Tensor
) -> None:
    """Code segments of tokens; see `dispatch.encode`."""
    for span, of_tokens, body, layout in _segments(keys, tiers, boundaries, bodies):
        for side, states in enumerate((keys[:, span], values[:, span])):
            source = adjacent(states)
            encode_side = sides.encode_vectors if whole_vectors(source) else sides.encode_side
            encode_side(*flat(source), of_tokens, body, layout.offsets, layout.shapes, side)


def decode(
    bodies: torch.Tensor, tiers: torch.Tensor, boundaries: Sequence[int], keys: torch.Tensor, values: torch.Tensor
) -> None:
    """Write the tokens of segments; see `dispatch.decode`."""
    for span, of_tokens, body, layout in _segments(keys, tiers, boundaries, bodies):
        for side, states in enumerate((keys[:, span], values[:, span])):
            with _written(states) as target:
                decode_side = sides.decode_vectors if streams(target) else sides.decode_side
                decode_side(body, layout.offsets, layout.shapes, of_tokens, *flat(target), side)


def _segments(
    keys: torch.Tensor, tiers: torch.Tensor, boundaries: Sequence[int], bodies: torch.Tensor
) -> Iterator[tuple[slice, np.ndarray, np.ndarray, BodyLayout]]:
    """Yield for each segment its tokens, their tiers, its body, and the body's layout."""
    heads, _, head_dim = keys.shape
    all_tiers, memory, begin = tiers.numpy(), bodies.numpy(), 0
    for first, end in pairwise(boundaries):
        of_tokens = all_tiers[first:end]
        # The loops take any 16 bits, so it does not matter here which 16-bit dtype this is.
        layout = body_layout(tier_counts(of_tokens), heads, head_dim, torch.float16)
        yield slice(first, end), of_tokens, memory[begin : begin + layout.bytes], layout
        begin += layout.bytes


def halves_are_finite(data: torch.Tensor, dtype: torch.dtype) -> bool:
    """Return whether no 16-bit float is infinite or NaN; see `dispatch.halves_are_finite`."""
    return bool(greatest_magnitude(data.numpy()) < _INFINITY_BITS[dtype])


@contextmanager
def _written(states: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield states to write to whose elements are side by side; what was written ends up in `states`."""
    target = adjacent(states)
    yield target
    if target is not states:
        states.copy_(target)


def prepare(dtype: torch.dtype) -> None:
    """Compile the loops, or load what an earlier process compiled; see `dispatch.prepare`."""
    # Each tier once: elements at 16 bits, scales and codes; in rows too short to be streamed and in whole vectors.
    tiers = torch.arange(4, dtype=torch.uint8)
    for head_dim in (2, ROW_ELEMENTS):
        keys, values = torch.ones(2, 1, 4, head_dim, dtype=dtype)
        body = torch.empty(segment_layout(tiers, 1, head_dim).bytes, dtype=torch.uint8)
        encode(keys, values, tiers, (0, 4), body)
        halves_are_finite(body[: 4 * head_dim], torch.float16)
        decode(body, tiers, (0, 4), keys, values)
