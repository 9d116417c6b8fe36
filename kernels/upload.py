"""From the host to a GPU: several small things in one copy, since a copy costs the host a call whatever its size."""

from collections.abc import Sequence
from itertools import accumulate

import torch

# Where each thing begins: kernels read whole vectors of so many bytes, and Triton compiles another kernel for memory
# that does not begin at a multiple of it.
ALIGNMENT = 16


def aligned(size: int) -> int:
    """Return a number of bytes, rounded up to a multiple of `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def upload(parts: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Copy tensors of the host to a device, all at once, without waiting for it.

    Args:
        parts: contiguous, any dtypes and addresses; they may be read-only.
        device: where they are wanted.

    Returns:
        Tensors of the same shapes and dtypes on `device`, one after another in one piece of memory, each at the next
        multiple of `ALIGNMENT` bytes.
    """
    sizes = [aligned(part.nbytes) for part in parts]
    begins = list(accumulate(sizes, initial=0))
    # Torch keeps page-locked memory that was freed, and hands it out again once the copies from it are done.
    staged = torch.empty(begins[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    for part, begin in zip(parts, begins[:-1], strict=True):
        staged[begin : begin + part.nbytes].copy_(part.reshape(-1).view(torch.uint8))
    there = staged.to(device, non_blocking=True)
    return [
        there[begin : begin + part.nbytes].view(part.dtype).view(part.shape)
        for part, begin in zip(parts, begins[:-1], strict=True)
    ]


def states_offset(base: tuple[torch.Tensor, torch.Tensor], others: tuple[torch.Tensor, torch.Tensor]) -> int:
    """Return how far some keys and values lie behind others of the same cache, so that one launch reaches both.

    Args:
        base: keys and values `[kv_heads, n, head_dim]`, views of a cache.
        others: other views of it, with the same strides.

    Returns:
        Elements, the same for keys and for values.
    """
    offsets = {one.storage_offset() - of_base.storage_offset() for one, of_base in zip(others, base, strict=True)}
    assert len(offsets) == 1
    assert all(one.stride() == of_base.stride() for one, of_base in zip(others, base, strict=True))
    return int(offsets.pop())
