"""The compiled loops against torch's own softmax."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectrumkv.kernels import attention_received_cpu, attention_received_reference


def random_attention(
    kv_heads: int, group: int, window: int, tokens: int, head_dim: int, seed: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries that make sharp and flat rows, and keys laid out token by token."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(kv_heads, group * window, head_dim, generator=generator)
    queries *= torch.exp(2 * torch.randn(kv_heads, group * window, 1, generator=generator))
    keys = torch.randn(tokens, kv_heads, head_dim, generator=generator).to(dtype).transpose(0, 1)
    return queries, keys


@given(
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    window=st.integers(1, 9),
    older=st.integers(0, 70),
    sliding_window=st.none() | st.integers(1, 80),
    softcap=st.none() | st.floats(1, 50),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_loops_agree_with_torch(
    kv_heads: int,
    group: int,
    window: int,
    older: int,
    sliding_window: int | None,
    softcap: float | None,
    dtype: torch.dtype,
    seed: int,
) -> None:
    queries, keys = random_attention(kv_heads, group, window, window + older, 8, seed, dtype)
    options = (window, sliding_window, softcap)
    actual = attention_received_cpu.attention_received(queries, keys, *options)
    expected = attention_received_reference.attention_received(queries, keys, *options)
    # A weight inherits the absolute error of its logit, which is relative to the largest one.
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=1e-6 * group * window)
    # Every query hands out one.
    torch.testing.assert_close(actual.sum(dim=1), torch.full((kv_heads,), float(group * window)), rtol=1e-5, atol=0)


def test_what_no_query_sees_receives_nothing() -> None:
    queries, keys = random_attention(1, 1, 2, 10, 8, 0, torch.float32)
    received = attention_received_cpu.attention_received(queries, keys, 2, 3, None)
    assert (received[0, :6] == 0).all()
    assert (received[0, 6:] > 0).all()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_what_is_not_finite_shows(poison: float) -> None:
    queries, keys = random_attention(1, 2, 3, 40, 8, 0, torch.float32)
    keys = keys.clone()
    keys[0, 17, 3] = poison
    received = attention_received_cpu.attention_received(queries, keys, 3, None, None)
    assert not received.isfinite().all()
