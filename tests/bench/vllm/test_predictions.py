"""KL from listed log-probabilities: exact where all tokens are listed, and otherwise a lower bound."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectrumkv.bench.vllm.predictions import Prediction, compare, divergence

TOKENS = 40
LOGITS = st.lists(st.floats(-8, 8), min_size=TOKENS, max_size=TOKENS)


def normalized(logits: list[float]) -> dict[int, float]:
    values = np.array(logits, dtype=np.float64)
    return dict(enumerate((values - np.logaddexp.reduce(values)).tolist()))


def most_likely(logprobs: dict[int, float], number: int) -> dict[int, float]:
    return dict(sorted(logprobs.items(), key=lambda one: -one[1])[:number])


def whole(received: dict[int, float], exact: dict[int, float]) -> float:
    return sum(math.exp(value) * (value - received[token]) for token, value in exact.items())


@given(LOGITS, LOGITS)
def test_divergence_over_all_tokens_is_exact(one: list[float], other: list[float]) -> None:
    received, exact = normalized(one), normalized(other)
    assert divergence(received, exact) == pytest.approx(whole(received, exact), abs=1e-9)


@given(LOGITS, LOGITS, st.integers(1, TOKENS))
def test_divergence_over_some_tokens_is_a_lower_bound(one: list[float], other: list[float], number: int) -> None:
    received, exact = normalized(one), normalized(other)
    found = divergence(most_likely(received, number), most_likely(exact, number))
    assert -1e-9 <= found <= whole(received, exact) + 1e-9


def test_equal_predictions_do_not_diverge() -> None:
    listed = most_likely(normalized([one / 7 for one in range(TOKENS)]), 5)
    assert divergence(listed, listed) == 0


def test_predictions_are_summed_over_tokens() -> None:
    exact, received = normalized([3.0, 2.0, 1.0]), normalized([2.0, 3.0, 1.0])
    found = compare([Prediction(received, 1), Prediction(exact, 2)], [Prediction(exact, 1), Prediction(exact, 2)])
    assert found.agreed == 1
    assert found.kl == pytest.approx(whole(received, exact))
    assert found.nll == pytest.approx(-received[1] - exact[2])
    assert found.nll_fp16 == pytest.approx(-exact[1] - exact[2])
