"""Logits processors across the hand-off: both services choose as one process would."""

import pytest
import torch

from spectrumkv.common.generation.params import SamplingParams
from spectrumkv.common.generation.sampling import Sampler
from tests.services.generation.test_generation import complete, prompt
from tests.services.pair import Pair
from tests.services.reference import reference_model

TOKENS = 10
CHOICES = {
    "presence": {"presence_penalty": 2.0},
    "frequency": {"frequency_penalty": 1.5, "temperature": 0.8, "seed": 3},
    "repetition": {"repetition_penalty": 1.4},
    "min_p": {"min_p": 0.2, "temperature": 1.0, "seed": 5},
    "bias": {"logit_bias": {11: 1.0, 12: -100.0}, "temperature": 1.0, "seed": 9},
    "all": {
        "presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.2, "min_p": 0.01, "top_k": 50,
        "temperature": 1.2, "seed": 1, "logit_bias": {9: 3.0}, "min_tokens": 4,
    },
}  # fmt: skip


@pytest.mark.parametrize("sampling", CHOICES.values(), ids=CHOICES)
def test_tokens_are_those_of_one_process(llama_pair: Pair, sampling: dict[str, object]) -> None:
    completion = complete(llama_pair, prompt(), max_tokens=TOKENS, ignore_eos=True, **sampling)
    model = reference_model(llama_pair.prefill.model.config.name_or_path)
    params = SamplingParams(max_tokens=TOKENS, ignore_eos=True, **sampling)
    sampler = Sampler(params, prompt().ids, llama_pair.prefill.vocabulary)
    ids = list(prompt().ids)
    for index in range(TOKENS):
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0, -1]
        ids.append(sampler.sample(logits, index).token_id)
    assert list(completion.token_ids) == ids[len(prompt().ids) :]


def test_a_bad_word_does_not_come_from_either_service(llama_pair: Pair) -> None:
    free = complete(llama_pair, prompt(), max_tokens=TOKENS, ignore_eos=True)
    tokenizer = llama_pair.prefill.tokenizer
    for position in (0, 3):
        word = tokenizer.decode([free.token_ids[position]])
        ids = [tokenizer.encode(way, add_special_tokens=False) for way in (word.lstrip(), " " + word.lstrip())]
        if [free.token_ids[position]] in ids:
            barred = complete(llama_pair, prompt(), max_tokens=TOKENS, ignore_eos=True, bad_words=(word,))
            assert free.token_ids[position] not in barred.token_ids
            return
    pytest.fail("the free answer has no word to bar")


def test_min_tokens_holds_across_the_hand_off(llama_pair: Pair) -> None:
    free = complete(llama_pair, prompt(), max_tokens=TOKENS, ignore_eos=True)
    ending = tuple(set(free.token_ids))
    assert len(complete(llama_pair, prompt(), max_tokens=TOKENS, stop_token_ids=ending).tokens) == 1
    held = complete(llama_pair, prompt(), max_tokens=TOKENS, stop_token_ids=ending, min_tokens=5)
    assert len(held.tokens) >= 6
    assert not set(held.token_ids[:5]) & set(ending)
