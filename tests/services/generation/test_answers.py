"""Several answers for one prompt: one hand-off, and each answer that of a request of its own."""

import pytest

from spectrumkv.client.completion import Completion
from spectrumkv.client.request import KvChoice, Sampling
from spectrumkv.common.errors import FailedPreconditionError, ResourceExhaustedError
from tests.services.generation.test_generation import complete, prompt
from tests.services.pair import Pair, total, wait_until_nothing_is_held

ANSWERS = 8
DRAWN = {"max_tokens": 12, "ignore_eos": True, "temperature": 1.0, "top_p": 0.95}


def answers(pair: Pair, kv: KvChoice, **sampling: object) -> Completion:
    return complete(pair, prompt(300), kv, **{**DRAWN, "seed": 7, "n": ANSWERS, **sampling})


@pytest.mark.parametrize("kv", [KvChoice(policy="native"), KvChoice(policy="greedy", budget=0.4)], ids=repr)
def test_answers_are_those_of_single_requests_over_kv_that_is_sent_once(llama_pair: Pair, kv: KvChoice) -> None:
    together = answers(llama_pair, kv)
    single = [answers(llama_pair, kv, seed=7 + answer, n=1) for answer in range(ANSWERS)]
    assert [one.text for one in together.answers] == [one.text for one in single]
    assert [one.token_ids for one in together.answers] == [one.token_ids for one in single]
    assert len({one.text for one in together.answers}) == ANSWERS
    assert together.usage.kv_bytes_sent == pytest.approx(single[0].usage.kv_bytes_sent, rel=0.01)
    assert together.usage.completion_tokens == sum(one.usage.completion_tokens for one in single)
    assert together.usage.prompt_tokens == 300


def test_each_answer_ends_by_itself(llama_pair: Pair) -> None:
    together = answers(llama_pair, KvChoice(policy="native"))
    first, third = together.answers[0].token_ids[0], together.answers[3].token_ids[3]
    stopped = answers(llama_pair, KvChoice(policy="native"), stop_token_ids=(first, third))
    for before, after in zip(together.answers, stopped.answers, strict=True):
        ids = before.token_ids
        length = next((place + 1 for place, one in enumerate(ids) if one in (first, third)), len(ids))
        assert after.token_ids == ids[:length]
        assert after.finish_reason == ("stop" if length < len(ids) or ids[-1] in (first, third) else "length")
    assert (len(stopped.answers[0].tokens), stopped.finish_reason) == (1, "stop")
    assert stopped.usage.completion_tokens == sum(len(one.tokens) for one in stopped.answers)


def test_all_answers_may_end_at_their_first_tokens(llama_pair: Pair) -> None:
    completion = answers(llama_pair, KvChoice(policy="native"), max_tokens=1)
    assert [(len(one.tokens), one.finish_reason) for one in completion.answers] == [(1, "length")] * ANSWERS
    wait_until_nothing_is_held(llama_pair.prefill_metrics, llama_pair.decode_metrics, seconds=5)


def test_leaving_frees_the_slots_of_all_answers(llama_pair: Pair) -> None:
    sampling = Sampling(max_tokens=400, ignore_eos=True, n=4)
    with llama_pair.client() as client, client.generate(prompt(), sampling=sampling) as stream:
        for _ in range(8):
            next(stream)
        held = total(llama_pair.decode_metrics, "kv_bytes_resident")
    assert held > 0
    wait_until_nothing_is_held(llama_pair.prefill_metrics, llama_pair.decode_metrics, seconds=5)


def test_answers_that_never_fit_are_refused_with_what_to_do(llama_pair: Pair) -> None:
    with pytest.raises((FailedPreconditionError, ResourceExhaustedError), match="slots for each of 64 answers"):
        complete(llama_pair, prompt(), max_tokens=440, ignore_eos=True, n=64)


def test_greedy_answers_are_equal(llama_pair: Pair) -> None:
    completion = complete(llama_pair, prompt(), max_tokens=5, ignore_eos=True, n=3)
    assert len({one.token_ids for one in completion.answers}) == 1
