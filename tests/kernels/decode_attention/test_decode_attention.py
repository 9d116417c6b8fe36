"""Attention over slots, by every implementation, against float64."""

from types import ModuleType
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectrumkv.kernels.decode_attention import cpu, decode_attention, dispatch, reference
from spectrumkv.kernels.decode_attention import triton as decode_attention_triton
from tests.kernels.absmax.states import DEVICE, DTYPES


@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=5),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    head_dim=st.sampled_from([16, 64, 80, 256]),
    window=st.none() | st.integers(1, 100),
    sharpness=st.sampled_from([0.1, 1.0, 8.0]),
    seed=st.integers(0, 2**16),
)
def test_each_row_attends_over_its_own_slots(
    lengths: list[int], kv_heads: int, group: int, head_dim: int, window: int | None, sharpness: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Slots of nobody lie before, between and behind.
    firsts = torch.tensor([3 + sum(lengths[:row]) + 2 * row for row in range(len(lengths))])
    ends = firsts + torch.tensor(lengths)
    slots = torch.full((2, kv_heads, int(ends[-1]) + 4, head_dim), torch.nan)
    for first, end in zip(firsts.tolist(), ends.tolist(), strict=True):
        slots[:, :, first:end] = torch.randn(2, kv_heads, end - first, head_dim, generator=generator)
    queries = torch.randn(len(lengths), 1, kv_heads * group, head_dim, generator=generator) * sharpness
    inputs = (queries.squeeze(1), slots[0], slots[1])
    actual = cpu.decode_attention(*inputs, firsts, ends - 1, head_dim**-0.5, window)
    plain = reference.decode_attention(*inputs, None, firsts, ends - 1, head_dim**-0.5, window, None)
    for row, (first, end) in enumerate(zip(firsts.tolist(), ends.tolist(), strict=True)):
        keys, values = slots[:, :, max(first, end - (window or end)) : end].double()
        grouped = queries[row, 0].double().view(kv_heads, group, head_dim)
        weights = torch.softmax(grouped @ keys.transpose(1, 2) * head_dim**-0.5, dim=-1)
        expected = (weights @ values).view(kv_heads * group, head_dim)
        # Of 1,500 rows with logits eight times as large the farthest was off by 1.2e-5, and by 2.8e-5 in plain torch.
        torch.testing.assert_close(actual[row].double(), expected, rtol=0, atol=1e-5 * max(1.0, sharpness / 4))
        torch.testing.assert_close(plain[row].double(), expected, rtol=0, atol=1e-5 * max(1.0, sharpness / 2))


# The interpreter multiplies the bits of bfloat16 and not its numbers.
# The reference bounds logits in the states' own dtype.
@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [
        pytest.param(reference, torch.float32, id="reference-float32"),
        *(
            pytest.param(decode_attention_triton, dtype, id=f"triton-{dtype}")
            for dtype in (DTYPES if DEVICE.type == "cuda" else DTYPES[:2])
        ),
    ],
)
@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim", "window", "softcap"),
    [
        *((2, 3, 64, None, None), (2, 3, 64, 40, 5.0)),
        *((2, 1, 80, None, None), (2, 1, 80, 40, 5.0)),
        # Like Gemma 3's layers with a window, and Gemma 2's.
        *((1, 20, 256, 40, None), (1, 20, 256, 40, 5.0)),
    ],
)
def test_rows_attend_over_slots_that_are_kept(
    implementation: ModuleType,
    dtype: torch.dtype,
    kv_heads: int,
    group: int,
    head_dim: int,
    window: int | None,
    softcap: float | None,
) -> None:
    generator = torch.Generator().manual_seed(head_dim)
    # One token, a block of them, and for one shape more blocks than there are parts.
    longest = decode_attention_triton.SPLITS * decode_attention_triton.BLOCK_TOKENS + 69
    lengths = [1, 64, longest if head_dim == 64 and dtype == torch.float32 else 230]
    firsts = torch.tensor([3 + sum(lengths[:row]) + 2 * row for row in range(len(lengths))])
    newest = firsts + torch.tensor(lengths) - 1
    slots = torch.full((2, kv_heads, int(newest[-1]) + 4, head_dim), torch.nan)
    kept = torch.zeros(slots.shape[2], dtype=torch.bool)
    for first, last in zip(firsts.tolist(), newest.tolist(), strict=True):
        slots[:, :, first : last + 1] = torch.randn(2, kv_heads, last + 1 - first, head_dim, generator=generator)
        kept[first : last + 1] = torch.rand(last + 1 - first, generator=generator) > 0.2
        # A whole block and more that was dropped.
        kept[first + 100 : first + 200] = False
        kept[last] = True
    # The kernel loads no dropped slot; the reference multiplies it by 0, and a pool clears what was dropped.
    slots[:, :, ~kept] = torch.nan if implementation is decode_attention_triton else 0.0
    slots = slots.to(dtype)
    queries = (2 * torch.randn(len(lengths), kv_heads * group, head_dim, generator=generator)).to(dtype)
    inputs = [one.to(DEVICE) for one in (queries, *slots, kept, firsts, newest)]
    actual = implementation.decode_attention(*inputs, head_dim**-0.5, window, softcap).cpu()
    assert actual.dtype == dtype
    for row, (first, last) in enumerate(zip(firsts.tolist(), newest.tolist(), strict=True)):
        if window:
            first = max(first, last + 1 - window)
        span = torch.arange(first, last + 1)[kept[first : last + 1]]
        keys, values = slots[:, :, span].double()
        grouped = queries[row].double().view(kv_heads, group, head_dim)
        logits = grouped @ keys.transpose(1, 2) * head_dim**-0.5
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        expected = (torch.softmax(logits, dim=-1) @ values).view(kv_heads * group, head_dim)
        tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
        torch.testing.assert_close(actual[row].double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("tokens", "threads", "dtype", "head_dim", "gaps", "softcap", "compiled"),
    [
        (5, 8, torch.float32, 64, False, None, True),
        (1024, 2, torch.float32, 64, False, None, True),
        # Torch has a thread for each of four KV heads, and rows are long.
        (1024, 8, torch.float32, 64, False, None, False),
        (5, 2, torch.bfloat16, 64, False, None, False),
        (5, 2, torch.float32, 72, False, None, False),
        (5, 2, torch.float32, 64, True, None, False),
        (5, 2, torch.float32, 64, False, 5.0, False),
    ],
)
def test_a_cpu_runs_compiled_loops_where_they_fit_and_are_faster(
    tokens: int,
    threads: int,
    dtype: torch.dtype,
    head_dim: int,
    gaps: bool,
    softcap: float | None,
    compiled: bool,
) -> None:
    slots = torch.ones(2, 4, tokens + 1, head_dim, dtype=dtype)
    first, kept = torch.tensor([0]), torch.ones(tokens + 1, dtype=torch.bool)
    with (
        patch.object(torch, "get_num_threads", return_value=threads),
        patch.object(cpu, "decode_attention", return_value="compiled"),
        patch.object(dispatch.reference, "decode_attention", return_value="torch"),
    ):
        chosen = decode_attention(
            slots[0, :, 0][None], *slots, kept if gaps else None, first, first + tokens, 1.0, None, softcap
        )
    assert chosen == ("compiled" if compiled else "torch")
