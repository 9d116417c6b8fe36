"""The compiled loop over slots against float64."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from spectrumkv.kernels.decode_attention_cpu import decode_attention


@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=5),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    head_dim=st.sampled_from([2, 6, 64, 80]),
    sharpness=st.sampled_from([0.1, 1.0, 8.0]),
    seed=st.integers(0, 2**16),
)
def test_each_row_attends_over_its_own_slots(
    lengths: list[int], kv_heads: int, group: int, head_dim: int, sharpness: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Slots of nobody lie before, between and behind.
    firsts = torch.tensor([3 + sum(lengths[:row]) + 2 * row for row in range(len(lengths))])
    ends = firsts + torch.tensor(lengths)
    slots = torch.full((2, kv_heads, int(ends[-1]) + 4, head_dim), torch.nan)
    for first, end in zip(firsts.tolist(), ends.tolist(), strict=True):
        slots[:, :, first:end] = torch.randn(2, kv_heads, end - first, head_dim, generator=generator)
    queries = torch.randn(len(lengths), 1, kv_heads * group, head_dim, generator=generator) * sharpness
    actual = decode_attention(queries.squeeze(1), slots[0], slots[1], firsts, ends, head_dim**-0.5)
    for row, (first, end) in enumerate(zip(firsts.tolist(), ends.tolist(), strict=True)):
        keys, values = slots[:, :, first:end].double()
        grouped = queries[row, 0].double().view(kv_heads, group, head_dim)
        weights = torch.softmax(grouped @ keys.transpose(1, 2) * head_dim**-0.5, dim=-1)
        expected = (weights @ values).view(kv_heads * group, head_dim)
        torch.testing.assert_close(actual[row].double(), expected, rtol=0, atol=1e-5)
