import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor, TopPLogitsWarper

from spectrumkv.common.errors import InternalError, InvalidArgumentError
from spectrumkv.common.generation import sampling
from spectrumkv.common.generation.processors import narrowing
from spectrumkv.common.generation.sampling import Sampler, SamplingParams, uniform

SEEDS = st.integers(0, 2**64 - 1)
INDEXES = st.integers(0, 2**32 - 1)


def logits_of(seed: int, vocab: int = 50, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * scale


def draws(params: SamplingParams, logits: torch.Tensor, number: int) -> Counter[int]:
    return Counter(Sampler(params, ()).sample(logits, index).token_id for index in range(number))


def assert_distributed(found: Counter[int], expected: torch.Tensor) -> None:
    """Every token with probability 0 is absent, and chi-square lies within 5 standard deviations of its mean."""
    number = sum(found.values())
    assert all(expected[token] > 0 for token in found)
    likely = [token for token in range(len(expected)) if expected[token] * number >= 5]
    rest = 1 - float(expected[likely].sum())
    cells = [(found[token], float(expected[token]) * number) for token in likely]
    if rest * number >= 5:
        cells.append((number - sum(found[token] for token in likely), rest * number))
    degrees = len(cells) - 1
    chi_square = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
    assert chi_square < degrees + 5 * math.sqrt(2 * degrees)


@given(SEEDS, INDEXES)
def test_chance_is_a_number_from_0_up_to_1_and_depends_on_seed_and_index(seed: int, index: int) -> None:
    assert 0 <= uniform(seed, index) < 1
    assert uniform(seed, index) == uniform(seed, index)
    assert uniform(seed, index) != uniform(seed, index + 1)
    assert uniform(seed, index) != uniform(seed ^ 1, index)


def test_chance_is_the_same_on_every_machine() -> None:
    # Written down from numpy 2.4 on x86-64: two hosts that differ here would draw different tokens.
    assert [uniform(0, 0), uniform(0, 1), uniform(2**64 - 1, 7)] == [
        0.011546754286331562,
        0.5023796042735054,
        0.6865660636114761,
    ]


@pytest.mark.parametrize("by", ["index", "seed"])
def test_chance_is_uniform_over_indexes_and_over_seeds(by: str) -> None:
    numbers = [uniform(7, step) if by == "index" else uniform(step, 7) for step in range(4000)]
    assert_distributed(Counter(int(number * 16) for number in numbers), torch.full((16,), 1 / 16))
    pairs = Counter(
        int(first * 4) * 4 + int(second * 4) for first, second in zip(numbers[::2], numbers[1::2], strict=True)
    )
    assert_distributed(pairs, torch.full((16,), 1 / 16))


def test_tokens_are_drawn_with_the_probabilities_of_the_model() -> None:
    logits = logits_of(1, vocab=12)
    for temperature in (0.5, 1.0, 2.0):
        found = draws(SamplingParams(temperature=temperature, seed=3), logits, 3000)
        assert_distributed(found, (logits.double() / temperature).softmax(-1))


@pytest.mark.parametrize("top_k", [1, 2, 7, 11, 12, 13, 10**6])
def test_top_k_leaves_the_k_likeliest(top_k: int) -> None:
    logits = logits_of(2, vocab=12, scale=0.3)
    found = draws(SamplingParams(temperature=1.0, top_k=top_k, seed=3), logits, 600)
    assert set(found) == set(logits.topk(min(top_k, 12)).indices.tolist())


@pytest.mark.parametrize(
    ("top_p", "kept"), [(1e-9, 1), (0.4, 1), (0.41, 2), (0.7, 2), (0.71, 3), (0.9, 3), (0.95, 4)]
)
def test_top_p_leaves_the_smallest_set_that_reaches_it(top_p: float, kept: int) -> None:
    order = [3, 0, 4, 1]
    probabilities = torch.empty(5, dtype=torch.float64)
    probabilities[[3, 0, 4, 1, 2]] = torch.tensor([0.405, 0.300, 0.201, 0.09, 0.004], dtype=torch.float64)
    found = draws(SamplingParams(temperature=1.0, top_p=top_p, seed=9), probabilities.log(), 400)
    assert set(found) == set(order[:kept])


def test_top_p_acts_on_what_temperature_and_top_k_leave() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    # Of the two likeliest, 0.5 / 0.8 = 0.625 belongs to the first.
    assert set(draws(SamplingParams(temperature=1.0, top_k=2, top_p=0.6, seed=1), logits, 300)) == {0}
    assert set(draws(SamplingParams(temperature=1.0, top_k=2, top_p=0.65, seed=1), logits, 300)) == {0, 1}
    # At temperature 1/2 the probabilities are as 25 : 9 : 2.25 : 0.25.
    assert set(draws(SamplingParams(temperature=0.5, top_p=0.68, seed=1), logits, 300)) == {0}


@given(
    seed=st.integers(0, 1000),
    scale=st.sampled_from([0.01, 1.0, 4.0, 30.0]),
    top_p=st.floats(0.01, 0.999),
    vocab=st.sampled_from([1, 2, 15, 16, 17, 300]),
)
def test_the_short_way_to_the_nucleus_finds_the_same_nucleus(
    seed: int, scale: float, top_p: float, vocab: int
) -> None:
    scores = logits_of(seed, vocab, scale).double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(narrowing, "NUCLEUS_CANDIDATES", 16)
        assert torch.equal(narrowing._nucleus(scores, top_p), TopPLogitsWarper(top_p)(None, scores.unsqueeze(0))[0])


def test_a_vocabulary_of_usual_size_has_the_same_nucleus() -> None:
    for scale in (0.1, 5.0):
        scores = logits_of(5, 49152, scale).double()
        expected = TopPLogitsWarper(0.9)(None, scores.unsqueeze(0))[0]
        assert torch.equal(narrowing._nucleus(scores, 0.9), expected)


@given(seed=SEEDS, index=INDEXES, history=st.lists(st.integers(0, 49), max_size=20), row=st.integers(0, 50))
def test_a_draw_depends_on_seed_and_index_and_not_on_what_came_before(
    seed: int, index: int, history: list[int], row: int
) -> None:
    params = SamplingParams(temperature=1.3, top_p=0.95, top_k=40, seed=seed)
    logits = logits_of(row)
    used = Sampler(params, history)
    for step in range(3):
        used.sample(logits_of(step), step)
    assert used.sample(logits, index) == Sampler(params, ()).sample(logits, index)


def test_decode_goes_on_where_prefill_stopped() -> None:
    params = SamplingParams(temperature=1.0, repetition_penalty=1.5, seed=11, logprobs=3)
    rows = [logits_of(step) for step in range(12)]
    alone = Sampler(params, [4, 5])
    expected = [alone.sample(row, index) for index, row in enumerate(rows)]
    first = Sampler(params, [4, 5]).sample(rows[0], 0)
    decode = Sampler(params, [4, 5])
    decode.observe(first.token_id)
    assert [first, *(decode.sample(row, index) for index, row in enumerate(rows[1:], 1))] == expected


@given(row=st.integers(0, 500), seed=SEEDS)
def test_temperature_0_takes_the_largest_logit_and_needs_no_seed(row: int, seed: int) -> None:
    logits = logits_of(row)
    best = int(logits.argmax())
    assert Sampler(SamplingParams(), ()).sample(logits, 0).token_id == best
    assert Sampler(SamplingParams(top_p=0.1, top_k=3, seed=seed), ()).sample(logits, 0).token_id == best


def test_of_equal_logits_the_lowest_id_wins() -> None:
    logits = torch.zeros(300)
    logits[[70, 200, 299]] = 2.0
    assert Sampler(SamplingParams(), ()).sample(logits, 0).token_id == 70


def test_without_a_seed_nothing_is_drawn() -> None:
    with pytest.raises(InvalidArgumentError, match=r"temperature 0\.7 needs a seed"):
        Sampler(SamplingParams(temperature=0.7), ())


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-6])
def test_the_lowest_temperatures_come_to_greedy(temperature: float) -> None:
    logits = logits_of(3)
    assert set(draws(SamplingParams(temperature=temperature, seed=1), logits, 20)) == {int(logits.argmax())}


def test_extreme_logits_and_temperatures_make_tokens() -> None:
    logits = torch.full((50,), -3e38)
    logits[7] = 3e38
    for temperature in (0.0, 0.01, 100.0):
        assert draws(SamplingParams(temperature=temperature, seed=1), logits, 5) == {7: 5}


def test_tokens_without_probability_are_never_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.tensor([-2000.0, 0.0, -2000.0, 0.0, -2000.0])
    for chance, expected in ((0.0, 1), (0.49, 1), (0.5, 3), (1 - 2.0**-53, 3), (1.0, 3)):
        monkeypatch.setattr(sampling, "uniform", lambda seed, index, chance=chance: chance)
        assert Sampler(SamplingParams(temperature=1.0, seed=1), ()).sample(logits, 0).token_id == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_logits_of_every_dtype_are_read_and_left_as_they_were(dtype: torch.dtype) -> None:
    logits = logits_of(8).to(dtype)
    before = logits.clone()
    params = SamplingParams(temperature=0.8, top_k=5, top_p=0.9, repetition_penalty=1.4, seed=1, logprobs=5)
    Sampler(params, [1, 2, 3]).sample(logits, 0)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_the_penalty_covers_prompt_and_completion(penalty: float) -> None:
    logits = logits_of(4)
    sampler = Sampler(SamplingParams(repetition_penalty=penalty), [1, 2, 2])
    seen = [1, 2]
    for index in range(10):
        penalize = RepetitionPenaltyLogitsProcessor(penalty)
        expected = int(penalize(torch.tensor([seen]), logits.double().unsqueeze(0)).argmax())
        assert sampler.sample(logits, index).token_id == expected
        seen.append(expected)


def test_a_strong_penalty_repeats_nothing() -> None:
    sampler = Sampler(SamplingParams(repetition_penalty=100), [0])
    chosen = [sampler.sample(torch.linspace(1, 2, 20), index).token_id for index in range(19)]
    assert chosen == list(range(19, 0, -1))


@given(row=st.integers(0, 500), logprobs=st.integers(0, 20), temperature=st.sampled_from([0.0, 2.0]))
def test_logprobs_are_the_log_softmax_of_the_logits_as_they_came(row: int, logprobs: int, temperature: float) -> None:
    logits = logits_of(row)
    params = SamplingParams(
        temperature=temperature, top_k=30, top_p=0.9, repetition_penalty=2.0, seed=5, logprobs=logprobs
    )
    sampled = Sampler(params, [1, 2]).sample(logits, 0)
    expected = logits.double().log_softmax(-1)
    assert sampled.logprob == float(expected[sampled.token_id])
    values, ids = expected.sort(descending=True)
    assert [one.token_id for one in sampled.top_logprobs] == ids[:logprobs].tolist()
    assert [one.logprob for one in sampled.top_logprobs] == values[:logprobs].tolist()


def test_logprobs_only_where_they_are_asked_for() -> None:
    sampled = Sampler(SamplingParams(), ()).sample(logits_of(1), 0)
    assert sampled.logprob is None
    assert sampled.top_logprobs == ()


def test_a_vocabulary_smaller_than_the_number_of_logprobs_gives_all_of_it() -> None:
    sampled = Sampler(SamplingParams(logprobs=20), ()).sample(torch.tensor([1.0, 1.0, 3.0]), 0)
    assert [one.token_id for one in sampled.top_logprobs] == [2, 0, 1]


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_make_no_token(broken: float, temperature: float) -> None:
    logits = logits_of(1)
    logits[17] = broken
    sampler = Sampler(SamplingParams(temperature=temperature, seed=1), ())
    with pytest.raises(InternalError, match="logits for token 4 cannot be used: 1 of 50 are infinite or NaN"):
        sampler.sample(logits, 4)


def test_infinities_that_cancel_are_found() -> None:
    with pytest.raises(InternalError, match="2 of 3"):
        Sampler(SamplingParams(), ()).sample(torch.tensor([math.inf, 1.0, -math.inf]), 0)


@pytest.mark.parametrize("shape", [(0,), (1, 50), ()])
def test_one_row_is_wanted(shape: Any) -> None:
    with pytest.raises(ValueError, match="one row"):
        Sampler(SamplingParams(), ()).sample(torch.zeros(shape), 0)
