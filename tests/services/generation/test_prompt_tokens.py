"""What a request hears of its prompt: tokens and texts with echo, log-probabilities from prefill's own passes."""

import pytest
import torch

from spectrumkv.client.request import KvChoice, Request, Sampling, TokenIds
from spectrumkv.common.errors import InvalidArgumentError
from tests.services.kv.test_lossless import random_prompt
from tests.services.pair import Pair
from tests.services.reference import reference_model

DRAWN = Sampling(max_tokens=4, ignore_eos=True)


def asked(pair: Pair, **fields: object) -> object:
    with pair.client() as client:
        return client.send(Request(sampling=DRAWN, kv=KvChoice(policy="native"), **fields)).result()


# The second one takes more than one chunk.
@pytest.mark.parametrize("length", [1, 30, 400])
def test_log_probabilities_of_the_prompt_are_the_models_own(llama_pair: Pair, length: int) -> None:
    prompt = TokenIds(tuple(random_prompt(length, seed=2)))
    completion = asked(llama_pair, prompt=prompt, prompt_logprobs=2)
    tokens = completion.prompt_tokens
    assert tuple(token.token_id for token in tokens) == prompt.ids
    assert (tokens[0].logprob, tokens[0].top_logprobs) == (None, ())
    model = reference_model(llama_pair.prefill.model.config.name_or_path)
    with torch.inference_mode():
        expected = model(torch.tensor([prompt.ids])).logits[0].double().log_softmax(-1)
    for place, token in enumerate(tokens[1:]):
        assert token.logprob == pytest.approx(float(expected[place, token.token_id]), abs=1e-3)
        assert token.top_logprobs[0].logprob == pytest.approx(float(expected[place].max()), abs=1e-3)
        assert len(token.top_logprobs) == 2
    plain = asked(llama_pair, prompt=prompt)
    assert plain.prompt_tokens == ()
    assert plain.token_ids == completion.token_ids


def test_echo_has_the_text_and_no_log_probabilities(llama_pair: Pair) -> None:
    text = "Grüße aus Köln 🙂 <|im_end|> end"
    tokens = asked(llama_pair, prompt=text, echo=True).prompt_tokens
    assert "".join(token.text for token in tokens) == text
    assert {token.logprob for token in tokens} == {None}


def test_too_many_are_refused(llama_pair: Pair) -> None:
    with pytest.raises(InvalidArgumentError, match="prompt_logprobs is 21; allowed: at most 20"):
        asked(llama_pair, prompt="x", prompt_logprobs=21)
