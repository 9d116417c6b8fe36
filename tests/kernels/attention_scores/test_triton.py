"""The kernels for GPUs against float64; Triton runs under its interpreter where there is no GPU."""

from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch

from spectrumkv.kernels.attention_scores import reference
from spectrumkv.kernels.attention_scores import triton as attention_scores_triton
from tests.kernels.absmax.states import DEVICE, DTYPES

CASES = [
    # kv_heads, group, w, n, head_dim; sliding window, bound
    ((1, 1, 1, 1, 16), None, None),
    ((2, 1, 1, 33, 64), 40, 5.0),
    ((1, 3, 7, 7, 80), None, 30.0),
    ((2, 3, 64, 131, 64), None, None),
    ((2, 3, 64, 131, 64), 50, 5.0),
    ((3, 2, 13, 200, 8), 1, None),
    ((1, 2, 39, 64, 256), 1000, 30.0),
]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """What a kernel forgets to write is NaN."""
    empty = torch.empty

    def poisoned(*shape: int, **options: object) -> torch.Tensor:
        made = empty(*shape, **options)  # type: ignore[call-overload]
        return made.fill_(torch.nan) if made.is_floating_point() else made

    with patch.object(torch, "empty", poisoned):
        yield


def states(
    kv_heads: int, group: int, window: int, tokens: int, head_dim: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries that make sharp and flat rows, cut from those of all tokens, and keys laid out token by token."""
    generator = torch.Generator().manual_seed(tokens)
    queries = torch.randn(kv_heads * group, tokens, head_dim, generator=generator)
    queries *= torch.exp(2 * torch.randn(kv_heads * group, tokens, 1, generator=generator))
    keys = torch.randn(tokens, kv_heads, head_dim, generator=generator).transpose(0, 1)
    return queries.to(dtype).to(DEVICE)[:, tokens - window :], keys.to(dtype).to(DEVICE)


def assert_agrees(
    queries: torch.Tensor, keys: torch.Tensor, sliding_window: int | None = None, softcap: float | None = None
) -> torch.Tensor:
    scaling = keys.shape[2] ** -0.5
    actual = attention_scores_triton.mean_attention(queries, keys, scaling, sliding_window, softcap)
    received = reference.accumulated_attention(
        queries.double().mul(scaling).reshape(keys.shape[0], -1, keys.shape[2]),
        keys.double(),
        queries.shape[1],
        sliding_window,
        softcap,
    )
    expected = reference.mean_of_seeing(received, queries.shape, sliding_window)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-7)
    return actual


@pytest.mark.parametrize(("shape", "sliding_window", "softcap"), CASES, ids=str)
def test_scores_are_those_of_float64(
    shape: tuple[int, int, int, int, int], sliding_window: int | None, softcap: float | None
) -> None:
    assert_agrees(*states(*shape), sliding_window, softcap)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_are_those_of_float64_in_every_dtype(dtype: torch.dtype) -> None:
    assert_agrees(*states(2, 3, 9, 40, 64, dtype))


def test_strides_make_no_difference() -> None:
    queries, keys = states(2, 2, 5, 40, 16)
    apart = [one.transpose(1, 2).contiguous().transpose(1, 2) for one in (queries, keys)]
    assert apart[1].stride(2) > 1
    assert torch.equal(assert_agrees(*apart), assert_agrees(queries, keys))


def test_biases_of_all_keys_do_no_harm() -> None:
    queries, keys = states(2, 2, 9, 70, 64)
    # A query and a key of Qwen's largest bias make logits of a thousand; float32 keeps four digits of their
    # fractions.
    keys[..., 3] += 900
    scores = attention_scores_triton.mean_attention(queries, keys, 0.1, None, None)
    assert scores.isfinite().all()
    torch.testing.assert_close(scores.sum(), scores.new_tensor(1.0), rtol=0.2, atol=0)


def test_what_no_query_sees_receives_nothing() -> None:
    scores = assert_agrees(*states(1, 2, 5, 90, 16), sliding_window=3)
    # Queries stand at 85 to 89 and see three tokens each.
    assert (scores[:83] == 0).all()
    assert (scores[83:] > 0).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("side", ["queries", "keys"])
def test_what_is_not_finite_shows(poison: float, side: str) -> None:
    queries, keys = states(1, 2, 3, 40, 16)
    (queries if side == "queries" else keys)[0, 1, 3] = poison
    assert not attention_scores_triton.mean_attention(queries, keys, 1.0, None, None).isfinite().all()


def test_equal_prompts_get_equal_scores() -> None:
    first, second = (assert_agrees(*states(2, 2, 9, 90, 32)) for _ in range(2))
    assert torch.equal(first, second)
