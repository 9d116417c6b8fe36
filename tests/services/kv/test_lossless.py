"""Rule 7 of the design: with policy `native`, output is that of one process."""

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from spectrumkv.client.completion import Completion
from spectrumkv.client.request import KvChoice, Sampling, TokenIds
from spectrumkv.common.model.embedded import embedded_model_directory
from tests.services.pair import Pair, running_pair
from tests.services.reference import assert_same_greedy, reference_model
from tests.services.same_tokens import ALLOWED, TOP_LOGPROBS, disagreement

NATIVE = KvChoice(policy="native")
PROMPT_LENGTHS = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 512, 640, 800, 1024, 1280, 1600, 2000)


def greedy(pair: Pair, prompt: list[int], tokens: int, kv: KvChoice = NATIVE) -> list[int]:
    with pair.client() as client:
        stream = client.generate(
            TokenIds(tuple(prompt)), sampling=Sampling(max_tokens=tokens, ignore_eos=True), kv=kv
        )
        return [token.token_id for token in stream.result().tokens]


def random_prompt(length: int, vocabulary: int = 49152, seed: int = 0) -> list[int]:
    return random.Random(f"{seed} {length}").choices(range(vocabulary), k=length)


def text_prompt(pair: Pair, length: int) -> list[int]:
    """The first tokens of a text that the model has something to say about."""
    text = (Path(__file__).parents[3] / "prefill_server/tuning/needle/haystack.txt").read_text()
    ids: list[int] = pair.prefill.tokenizer(text).input_ids
    start = length % 50
    return ids[start : start + length]


@pytest.mark.parametrize("length", [1, 7, 40, 150])
def test_every_architecture_is_served_losslessly(tiny_pair: Pair, length: int) -> None:
    prompt = random_prompt(length)
    tokens = greedy(tiny_pair, prompt, 64)
    assert len(tokens) == 64
    config = tiny_pair.prefill.model.config
    softcapped = getattr(config, "attn_logit_softcapping", None) is not None
    assert_same_greedy(reference_model(Path(config.name_or_path), softcapped), prompt, tokens)


def test_four_clients_at_once_get_what_they_get_alone(llama_pair: Pair) -> None:
    """Up to the last bit, by which shared passes and batches differ: a draw or a near-tie may fall on either side."""
    shared = {"ignore_eos": True, "logprobs": TOP_LOGPROBS}
    samplings = [
        Sampling(**shared, max_tokens=48),
        Sampling(**shared, max_tokens=64, temperature=0.8, seed=1),
        Sampling(**shared, max_tokens=32, temperature=1.0, top_p=0.9, top_k=50, seed=2),
        Sampling(**shared, max_tokens=56, repetition_penalty=1.3),
    ]
    prompts = [random_prompt(length, seed=9) for length in (5, 60, 90, 33)]
    requests = [(prompt, sampling, NATIVE) for prompt, sampling in zip(prompts, samplings, strict=True)]

    def run(prompt: list[int], sampling: Sampling, kv: KvChoice) -> Completion:
        with llama_pair.client() as client:
            return client.generate(TokenIds(tuple(prompt)), sampling=sampling, kv=kv).result()

    alone = [run(*one) for one in requests]
    together: dict[int, Completion] = {}
    gate = threading.Barrier(len(requests))

    def run_at_the_gate(number: int) -> None:
        gate.wait()
        together[number] = run(*requests[number])

    threads = [threading.Thread(target=run_at_the_gate, args=(number,)) for number in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(together) == [0, 1, 2, 3]
    for number, mine in enumerate(alone):
        assert len(together[number].tokens) == len(mine.tokens)
        assert disagreement(mine, together[number]) <= ALLOWED


@pytest.fixture(scope="module")
def default_pair() -> Iterator[Pair]:
    with running_pair(None) as pair:
        yield pair


@pytest.fixture(scope="module")
def default_reference() -> PreTrainedModel:
    return reference_model(embedded_model_directory())


@pytest.mark.slow
@pytest.mark.parametrize("length", PROMPT_LENGTHS)
def test_the_default_model_is_served_losslessly(
    default_pair: Pair, default_reference: PreTrainedModel, length: int
) -> None:
    prompt = text_prompt(default_pair, length)
    assert_same_greedy(default_reference, prompt, greedy(default_pair, prompt, 64))
