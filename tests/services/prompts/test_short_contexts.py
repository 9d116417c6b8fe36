"""A prompt that leaves little room is answered as far as the room goes, where the request does not say how far."""

import pytest

from spectrumkv.client.request import Sampling, TokenIds
from spectrumkv.common.errors import InvalidArgumentError
from tests.services.kv.test_lossless import random_prompt
from tests.services.pair import Pair


@pytest.mark.parametrize(("prompt_tokens", "answer"), [(2000, 48), (2047, 1), (100, 128)])
def test_the_default_answer_is_as_long_as_the_room(llama_pair: Pair, prompt_tokens: int, answer: int) -> None:
    prompt = TokenIds(tuple(random_prompt(prompt_tokens)))
    with llama_pair.client() as client:
        completion = client.generate(prompt, sampling=Sampling(ignore_eos=True)).result()
    assert len(completion.tokens) == answer


def test_an_answer_that_was_asked_for_is_not_cut(llama_pair: Pair) -> None:
    prompt = TokenIds(tuple(random_prompt(2000)))
    with llama_pair.client() as client, pytest.raises(InvalidArgumentError, match="set max_tokens to 48 or less"):
        client.generate(prompt, sampling=Sampling(max_tokens=128)).result()


def test_a_full_context_is_refused(llama_pair: Pair) -> None:
    prompt = TokenIds(tuple(random_prompt(2048)))
    with llama_pair.client() as client, pytest.raises(InvalidArgumentError, match="shorten the prompt by 1 tokens"):
        client.generate(prompt).result()
