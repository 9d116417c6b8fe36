"""The compiled loops against torch's own softmax."""

import subprocess
import sys
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectrumkv.kernels.attention_scores import cpu, reference
from spectrumkv.kernels.jit import strided


def random_attention(
    kv_heads: int, group: int, window: int, tokens: int, head_dim: int, seed: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries that make sharp and flat rows, and keys laid out token by token."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(kv_heads, group * window, head_dim, generator=generator)
    queries *= torch.exp(2 * torch.randn(kv_heads, group * window, 1, generator=generator))
    keys = torch.randn(tokens, kv_heads, head_dim, generator=generator).to(dtype).transpose(0, 1)
    return queries, keys


@pytest.fixture(params=[False, True], ids=["float32", "bfloat16"])
def in_bfloat16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether products are of bfloat16; torch computes them on every processor, only not faster on every one."""
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: request.param)


@given(
    kv_heads=st.integers(1, 5),
    group=st.integers(1, 3),
    window=st.integers(1, 9),
    older=st.integers(0, 70),
    sliding_window=st.none() | st.integers(1, 80),
    softcap=st.none() | st.floats(1, 50),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    heads_at_once=st.integers(0, 6),
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
    heads_at_once: int,
    seed: int,
) -> None:
    queries, keys = random_attention(kv_heads, group, window, window + older, 8, seed, dtype)
    options = (window, sliding_window, softcap)
    logits_bytes = 4 * heads_at_once * group * window * (window + older)
    with (
        patch.object(cpu, "multiplies_bfloat16", return_value=False),
        patch.object(cpu, "LOGITS_BYTES", logits_bytes),
    ):
        actual = cpu.accumulated_attention(queries, keys, *options)
    expected = reference.accumulated_attention(queries, keys, *options)
    # A weight inherits the absolute error of its logit, which is relative to the largest one.
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=1e-6 * group * window)
    # Every query hands out one.
    torch.testing.assert_close(actual.sum(dim=1), torch.full((kv_heads,), float(group * window)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("bias", [0.0, 900.0])
@pytest.mark.parametrize(("window", "tokens"), [(1, 1), (3, 17), (7, 300)])
def test_bfloat16_agrees_within_its_digits_whatever_all_keys_share(window: int, tokens: int, bias: float) -> None:
    queries, keys = random_attention(2, 3, window, tokens, 64, 1, torch.float32)
    queries = queries / queries.norm(dim=-1, keepdim=True)
    keys = keys + bias * torch.eye(64)[5]
    with patch.object(cpu, "multiplies_bfloat16", return_value=True):
        actual = cpu.accumulated_attention(queries, keys, window, None, None)
    # With a bias a float32 sum has too few digits to compare with.
    expected = reference.accumulated_attention(queries.double(), keys.double(), window, None, None)
    torch.testing.assert_close(actual.double(), expected, rtol=0.03, atol=0)
    torch.testing.assert_close(actual.sum(dim=1), torch.full((2,), 3.0 * window), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("heads", "tokens", "head_dim"), [(1, 1, 1), (2, 17, 5), (3, 33, 80)])
def test_keys_are_centred_and_rounded_as_torch_rounds(heads: int, tokens: int, head_dim: int) -> None:
    # Models leave keys token by token.
    keys = torch.randn(tokens, heads, head_dim, generator=torch.Generator().manual_seed(0)).mul(9).transpose(0, 1)
    centred = torch.full((heads, tokens, head_dim), torch.nan, dtype=torch.bfloat16)
    cpu.centre(*strided.flat(keys), 4, strided.array(centred))
    exact = keys.double() - keys[:, ::4].double().mean(dim=1, keepdim=True)
    torch.testing.assert_close(centred.double(), exact, rtol=2.0**-8, atol=1e-5)
    # The mean of one token is the token itself.
    alone = torch.tensor([1.0, 1 + 2**-8, 1 + 2**-7 + 2**-8, -3.3e38]).reshape(1, 1, 4)
    shifted = torch.cat([torch.zeros_like(alone), alone], dim=1)
    rounded = torch.empty(1, 2, 4, dtype=torch.bfloat16)
    cpu.centre(*strided.flat(shifted), 2, strided.array(rounded))
    assert torch.equal(rounded[:, 1:], alone.bfloat16())


@pytest.mark.parametrize("digits", [0x7FC00000, 0x7FFFFFFF, 0x7F800001, -1], ids=hex)
def test_no_digits_of_nan_round_to_a_number(digits: int) -> None:
    keys = torch.zeros(1, 3, 2)
    keys[0, 1, 1] = torch.tensor([digits], dtype=torch.int32).view(torch.float32)
    centred = torch.zeros(1, 3, 2, dtype=torch.bfloat16)
    cpu.centre(*strided.flat(keys), 8, strided.array(centred))
    assert centred.isnan().nonzero().tolist() == [[0, 1, 1]]


def test_a_bound_of_the_logits_keeps_them_at_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, keys = random_attention(1, 2, 3, 40, 8, 0, torch.float32)
    keys = keys + 5.0
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: True)
    actual = cpu.accumulated_attention(queries, keys, 3, None, 20.0)
    expected = reference.accumulated_attention(queries, keys, 3, None, 20.0)
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=6e-6)


@pytest.mark.usefixtures("in_bfloat16")
def test_what_no_query_sees_receives_nothing() -> None:
    queries, keys = random_attention(1, 1, 2, 10, 8, 0, torch.float32)
    received = cpu.accumulated_attention(queries, keys, 2, 3, None)
    assert (received[0, :6] == 0).all()
    assert (received[0, 6:] > 0).all()


@pytest.mark.usefixtures("in_bfloat16")
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_what_is_not_finite_shows(poison: float) -> None:
    queries, keys = random_attention(1, 2, 3, 40, 8, 0, torch.float32)
    keys = keys.clone()
    keys[0, 17, 3] = poison
    received = cpu.accumulated_attention(queries, keys, 3, None, None)
    assert not received.isfinite().all()


# In a process of its own: what other tests had compiled would hide what is missing.
PREPARED = """
import torch
from spectrumkv.kernels.attention_scores import cpu
cpu.multiplies_bfloat16 = lambda: True
cpu.prepare()

def signatures():
    loops = vars(cpu).items()
    return {(name, one) for name, loop in loops for one in getattr(loop, "signatures", ())}

prepared = signatures()
for tokens in (1, 70):
    keys = torch.ones(tokens, 2, 8).transpose(0, 1)
    for softcap in (None, 30.0):
        cpu.accumulated_attention(torch.ones(2, 3, 8), keys, 1, 5, softcap)
print(sorted(map(str, signatures() - prepared)))
"""


@pytest.mark.slow
def test_no_request_waits_for_a_compiler_whether_its_logits_are_bounded_or_not() -> None:
    done = subprocess.run([sys.executable, "-c", PREPARED], capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout.strip() == "[]"
