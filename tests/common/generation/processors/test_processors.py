"""What each logits processor changes, against its definition in plain Python."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.generation.params import SamplingParams
from spectrumkv.common.generation.processors import History, Stage, make_processors, processors
from spectrumkv.common.generation.sampling import Sampler
from spectrumkv.common.generation.vocabulary import Vocabulary

VOCAB = 40
LOGITS = st.lists(st.floats(-20, 20, width=32), min_size=VOCAB, max_size=VOCAB).map(torch.tensor)
HISTORIES = st.lists(st.integers(0, VOCAB - 1), max_size=12)


def processed(params: SamplingParams, logits: torch.Tensor, generated: list[int], prompt: tuple[int, ...] = ()):
    history = History(prompt)
    for token_id in generated:
        history.append(token_id)
    scores = logits.double()
    before = scores.clone()
    for process in make_processors(params, None):
        scores = process(scores, history)
    assert torch.equal(logits.double(), before)
    return scores


def test_each_stage_has_its_processors() -> None:
    by_stage = Counter(stage for stage, _ in map(processors.get, processors))
    assert set(by_stage) == set(Stage)
    assert make_processors(SamplingParams(), None) == []
    assert len(make_processors(SamplingParams(temperature=1.0, top_k=3, top_p=0.5, min_p=0.1), None)) == 4


@given(LOGITS, HISTORIES, st.floats(-2, 2), st.floats(-2, 2))
def test_presence_counts_once_and_frequency_each_time(
    logits: torch.Tensor, generated: list[int], presence: float, frequency: float
) -> None:
    params = SamplingParams(presence_penalty=presence, frequency_penalty=frequency)
    found = processed(params, logits, generated, prompt=(1, 2, 3))
    counts = Counter(generated)
    expected = [
        value - presence * (token in counts) - frequency * counts[token]
        for token, value in enumerate(logits.double().tolist())
    ]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


@given(LOGITS, HISTORIES)
def test_only_the_repetition_penalty_counts_the_prompt(logits: torch.Tensor, generated: list[int]) -> None:
    found = processed(SamplingParams(repetition_penalty=2.0), logits, generated, prompt=(1, 2))
    seen = {1, 2, *generated}
    expected = [
        value if token not in seen else value / 2 if value > 0 else value * 2
        for token, value in enumerate(logits.double().tolist())
    ]
    assert found.tolist() == expected


@given(LOGITS, st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100), max_size=5))
def test_a_bias_is_added(logits: torch.Tensor, bias: dict[int, float]) -> None:
    found = processed(SamplingParams(logit_bias=bias), logits, [])
    expected = [value + bias.get(token, 0.0) for token, value in enumerate(logits.double().tolist())]
    assert found.tolist() == expected


@given(LOGITS, st.floats(0.001, 1), st.floats(0.1, 3))
def test_min_p_is_relative_to_the_likeliest_token(logits: torch.Tensor, min_p: float, temperature: float) -> None:
    found = processed(SamplingParams(min_p=min_p, temperature=temperature), logits, [])
    probabilities = (logits.double() / temperature).softmax(-1)
    clear = ((probabilities / probabilities.max()) / min_p - 1).abs() > 1e-9
    assert torch.equal(found.isfinite()[clear], (probabilities >= min_p * probabilities.max())[clear])


def test_nothing_ends_an_answer_before_min_tokens(vocabulary: Vocabulary) -> None:
    (eos,) = vocabulary.eos_token_ids
    logits = torch.zeros(vocabulary.size)
    logits[[eos, 7, 9]] = torch.tensor([9.0, 8.0, 7.0])
    sampler = Sampler(SamplingParams(min_tokens=2, stop_token_ids=frozenset({7})), (), vocabulary)
    assert [sampler.sample(logits, index).token_id for index in range(3)] == [9, 9, eos]
    ignoring = Sampler(SamplingParams(min_tokens=2, ignore_eos=True), (), vocabulary)
    assert ignoring.sample(logits, 0).token_id == eos


def test_a_bad_word_is_not_completed(vocabulary: Vocabulary) -> None:
    spellings = vocabulary.spellings("Mississippi river")
    assert len(spellings) == 2
    for ids in spellings:
        assert len(ids) > 1
        sampler = Sampler(SamplingParams(bad_words=("Mississippi river",)), (), vocabulary)
        logits = torch.zeros(vocabulary.size)
        logits[ids[-1]] = 5.0
        assert sampler.sample(logits, 0).token_id == ids[-1]
        for token_id in ids[:-1]:
            sampler.observe(token_id)
        assert sampler.sample(logits, len(ids)).token_id != ids[-1]
        assert sampler.sample(logits, len(ids) + 1).token_id == ids[-1]


def test_a_bad_word_of_one_token_never_comes(vocabulary: Vocabulary) -> None:
    single = [ids for ids in vocabulary.spellings("the") if len(ids) == 1]
    assert len(single) == 2
    logits = torch.zeros(vocabulary.size)
    logits[[ids[0] for ids in single]] = 5.0
    chosen = Sampler(SamplingParams(bad_words=("the",)), (), vocabulary).sample(logits, 0)
    assert (chosen.token_id,) not in single


def test_where_nothing_is_left_the_request_is_told(vocabulary: Vocabulary) -> None:
    logits = torch.zeros(3)
    small = Vocabulary(vocabulary.tokenizer, frozenset({0, 1, 2}), 3)
    with pytest.raises(InvalidArgumentError, match="no token is left for token 0 of the answer: min_tokens"):
        Sampler(SamplingParams(min_tokens=1), (), small).sample(logits, 0)


def test_penalties_come_before_the_draw_is_narrowed() -> None:
    logits = torch.tensor([5.0, 4.9, -math.pi])
    params = SamplingParams(temperature=1.0, seed=1, top_k=1, presence_penalty=2.0)
    sampler = Sampler(params, ())
    assert [sampler.sample(logits, index).token_id for index in range(2)] == [0, 1]
