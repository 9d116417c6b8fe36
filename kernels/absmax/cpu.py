"""Absmax quantization on CPUs: tensors in, the compiled loops of `absmax_sides` over their memory.

Importing this module imports numba, a third of a second. Each function compiles at its first call with a dtype, or
loads what an earlier process compiled.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch

from spectrumkv.kernels.absmax import cpu_sides as sides
from spectrumkv.kernels.absmax.cpu_rows import greatest_magnitude
from spectrumkv.kernels.absmax.cpu_vectors import ROW_ELEMENTS, streams, whole_vectors
from spectrumkv.kernels.absmax.layout import body_bytes
from spectrumkv.kernels.jit.strided import adjacent, flat

_INFINITY_BITS = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80}


def encode(
    keys: torch.Tensor, values: torch.Tensor, tiers: torch.Tensor, cuts: Sequence[int], bodies: torch.Tensor
) -> None:
    """See `spectrumkv.kernels.absmax.encode`."""
    heads, _, head_dim = keys.shape
    for span, body in _segments(bodies, tiers, cuts, heads, head_dim):
        for side, states in enumerate((keys[:, span], values[:, span])):
            source = adjacent(states)
            encode_side = sides.encode_vectors if whole_vectors(source) else sides.encode_side
            encode_side(*flat(source), tiers[span].numpy(), heads, head_dim, body.numpy(), side)


def decode(
    bodies: torch.Tensor, tiers: torch.Tensor, cuts: Sequence[int], keys: torch.Tensor, values: torch.Tensor
) -> None:
    """See `spectrumkv.kernels.absmax.decode`."""
    heads, _, head_dim = keys.shape
    for span, body in _segments(bodies, tiers, cuts, heads, head_dim):
        for side, states in enumerate((keys[:, span], values[:, span])):
            with _written(states) as target:
                decode_side = sides.decode_vectors if streams(target) else sides.decode_side
                decode_side(body.numpy(), tiers[span].numpy(), heads, head_dim, *flat(target), side)


def _segments(
    bodies: torch.Tensor, tiers: torch.Tensor, cuts: Sequence[int], heads: int, head_dim: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """The tokens of each segment and its body."""
    spans = [slice(first, end) for first, end in pairwise(cuts)]
    if len(spans) == 1:
        yield spans[0], bodies
        return
    sizes = [body_bytes(tiers[span], heads, head_dim) for span in spans]
    yield from zip(spans, torch.split(bodies, sizes), strict=True)


def is_finite(data: torch.Tensor, dtype: torch.dtype) -> bool:
    """See `spectrumkv.kernels.absmax.is_finite`."""
    return bool(greatest_magnitude(data.numpy()) < _INFINITY_BITS[dtype])


@contextmanager
def _written(states: torch.Tensor) -> Iterator[torch.Tensor]:
    """Give states to write to whose elements are side by side; what was written ends up in `states`."""
    target = adjacent(states)
    yield target
    if target is not states:
        states.copy_(target)


def prepare(dtype: torch.dtype) -> None:
    """See `spectrumkv.kernels.absmax.prepare`."""
    # Each tier once: elements at 16 bits, scales and codes; in rows too short to be streamed and in whole vectors.
    tiers = torch.arange(4, dtype=torch.uint8)
    for head_dim in (2, ROW_ELEMENTS):
        keys, values = torch.ones(2, 1, 4, head_dim, dtype=dtype)
        body = torch.empty(body_bytes(tiers, 1, head_dim), dtype=torch.uint8)
        encode(keys, values, tiers, (0, 4), body)
        is_finite(body[: 4 * head_dim], torch.float16)
        decode(body, tiers, (0, 4), keys, values)
