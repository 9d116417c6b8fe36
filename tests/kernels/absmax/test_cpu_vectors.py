"""Which rows are written past the cache, and that they are what others are."""

import subprocess
import sys

import pytest
import torch

from spectrumkv.kernels.absmax import cpu as absmax_cpu
from spectrumkv.kernels.absmax import reference as absmax_reference
from spectrumkv.kernels.absmax.cpu_vectors import VECTOR_BYTES, streams
from spectrumkv.kernels.absmax.layout import segment_layout
from spectrumkv.kernels.jit.llvm import LANES

HEADS, TOKENS = 3, 37
# In a process of its own: what other tests had compiled would hide what is missing.
REQUEST = """
import torch
from spectrumkv.kernels.absmax import cpu as absmax_cpu, cpu_sides as absmax_sides
from spectrumkv.kernels.absmax.layout import segment_layout

def signatures():
    loops = vars(absmax_sides).items()
    return {(name, one) for name, loop in loops for one in getattr(loop, "signatures", ())}

absmax_cpu.prepare(torch.float32)
prepared = signatures()
tiers = torch.arange(300, dtype=torch.uint8) % 4
for head_dim in (64, 80):
    keys, values = torch.randn(2, 300, 3, head_dim).transpose(1, 2)
    body = torch.empty(segment_layout(tiers, 3, head_dim).bytes, dtype=torch.uint8)
    absmax_cpu.encode(keys, values, tiers, (0, 300), body)
    slots = torch.empty(2, 3, 600, head_dim)[:, :, 300:]
    absmax_cpu.decode(body, tiers, (0, 300), slots[0], slots[1])
print(sorted(map(str, signatures() - prepared)))
"""


def slots_at(offset: int, head_dim: int) -> torch.Tensor:
    """NaNs `[2, heads, tokens, head_dim]` that begin so many bytes after the start of a vector."""
    elements = 2 * HEADS * TOKENS * head_dim
    memory = torch.full((elements + 64,), torch.nan)
    skipped = (offset - memory.data_ptr()) % VECTOR_BYTES // 4
    return memory[skipped:][:elements].view(2, HEADS, TOKENS, head_dim)


def decoded(slots: torch.Tensor) -> torch.Tensor:
    """Random keys and values in every tier, as they come out in the slots."""
    head_dim = slots.shape[-1]
    tiers = torch.arange(TOKENS, dtype=torch.uint8) % 4
    states = torch.randn(2, HEADS, TOKENS, head_dim, generator=torch.Generator().manual_seed(head_dim))
    body = torch.empty(segment_layout(tiers, HEADS, head_dim).bytes, dtype=torch.uint8)
    absmax_reference.encode(states[0], states[1], tiers, (0, TOKENS), body)
    absmax_cpu.decode(body, tiers, (0, TOKENS), slots[0], slots[1])
    wanted = torch.full_like(states, torch.nan)
    absmax_reference.decode(body, tiers, (0, TOKENS), wanted[0], wanted[1])
    return wanted


@pytest.mark.parametrize("vectors", [2, 4, 6, 10, 16])
def test_rows_of_whole_vectors_are_streamed(vectors: int) -> None:
    slots = slots_at(0, vectors * LANES)
    assert streams(slots[0])
    wanted = decoded(slots)
    assert torch.equal(slots.nan_to_num(7e4), wanted.nan_to_num(7e4))


@pytest.mark.parametrize(("offset", "head_dim"), [(4, 64), (VECTOR_BYTES // 2, 64), (0, 64 + LANES), (0, 2)])
def test_other_rows_are_written_as_usual(offset: int, head_dim: int) -> None:
    slots = slots_at(offset, head_dim)
    assert not streams(slots[0])
    wanted = decoded(slots)
    assert torch.equal(slots.nan_to_num(7e4), wanted.nan_to_num(7e4))


def test_tokens_that_lie_at_odd_places_are_not_streamed() -> None:
    assert streams(torch.empty(2, 9, 64)[:, 3:])
    assert not streams(torch.empty(2, 9, 65)[:, :, :64])
    assert not streams(torch.empty(2, 9 * 64 + 1)[:, : 9 * 64].view(2, 9, 64))
    assert not streams(torch.empty(2, 9, 64, dtype=torch.bfloat16))


@pytest.mark.slow
def test_no_request_waits_for_a_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", REQUEST], capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout.strip() == "[]"
