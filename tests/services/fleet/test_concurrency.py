"""Clients at once over quantized KV get what each gets alone, up to what the last bit of a shared pass can change.

Prompts that share a padded pass differ from prompts that run alone by rounding, about 1e-6 of a key or value. Most of
that a quantizer swallows; an element that lies on the edge between two steps moves by a whole step, one in very many.
So what the model predicts must agree far better than quantization itself changes it.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from spectrumkv.client.completion import Completion
from spectrumkv.client.request import KvChoice, Sampling, TokenIds
from spectrumkv.prefill_server.engine.engine import PrefillEngine
from spectrumkv.prefill_server.engine.prompt_queue import QueuedPrefill
from tests.services.kv.test_lossless import NATIVE, random_prompt, text_prompt
from tests.services.pair import Pair, running_pair
from tests.services.same_tokens import ALLOWED, TOP_LOGPROBS, disagreement, parting

# The default policy and the codecs that tiers are written by. A codec that is not named may change between two
# requests, where prefill finds the coder slow, and their answers with it.
CHOICES = {
    "default": KvChoice(codec="spectral"),
    "spectral 0.15": KvChoice(policy="spectral", budget=0.15, codec="spectral"),
    "adaptive 0.3": KvChoice(policy="adaptive", budget=0.3),
    "greedy 0.5": KvChoice(policy="greedy", budget=0.5),
    "uniform-int4": KvChoice(policy="uniform-int4"),
}
QUICK = ("default", "adaptive 0.3")
# Of the divergence from exact KV, which shows that the comparison can tell.
OF_QUANTIZATION = 0.2
TOKENS = 16
WAIT_SECONDS = 60.0


class Gate:
    """Lets the next pass begin when so many prompts wait, and counts the prompts of each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        self._wanted = 0
        sound = PrefillEngine._next_batch

        def next_batch(engine: PrefillEngine) -> list[QueuedPrefill]:
            deadline = time.monotonic() + WAIT_SECONDS
            while engine.waiting < self._wanted and time.monotonic() < deadline:
                time.sleep(0.001)
            self._wanted = 0
            batch = sound(engine)
            self.sizes += [len(batch)] if batch else []
            return batch

        monkeypatch.setattr(PrefillEngine, "_next_batch", next_batch)

    def wait_for(self, prompts: int) -> None:
        self._wanted = prompts


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def ask(pair: Pair, prompt: list[int], sampling: Sampling, kv: KvChoice) -> Completion:
    with pair.client() as client:
        return client.generate(TokenIds(tuple(prompt)), sampling=sampling, kv=kv, timeout=WAIT_SECONDS).result()


def samplings() -> list[Sampling]:
    shared = {"max_tokens": TOKENS, "ignore_eos": True, "logprobs": TOP_LOGPROBS}
    return [
        Sampling(**shared),
        Sampling(**shared),
        Sampling(**shared, temperature=0.8, seed=1),
        Sampling(**shared, repetition_penalty=1.3),
    ]


def assert_together_as_alone(pair: Pair, prompts: list[list[int]], kv: KvChoice, gate: Gate) -> None:
    requests = list(zip(prompts, samplings(), strict=True))
    alone = [ask(pair, *request, kv) for request in requests]
    exact = [ask(pair, *request, NATIVE) for request in requests]
    gate.sizes.clear()
    gate.wait_for(len(requests))
    with ThreadPoolExecutor(len(requests)) as pool:
        together = list(pool.map(lambda request: ask(pair, *request, kv), requests))
    assert gate.sizes == [len(requests)], "the prompts did not share a pass"
    for mine, theirs, without_codec in zip(together, alone, exact, strict=True):
        difference = disagreement(mine, theirs)
        where = f"they part after {parting(mine, theirs)} of {TOKENS} tokens"
        assert difference <= ALLOWED, f"{difference} nats, and {where}"
        assert difference <= OF_QUANTIZATION * disagreement(theirs, without_codec), f"{difference} nats, and {where}"


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CHOICES]
)
def test_four_clients_at_once_agree_with_each_alone(llama_pair: Pair, name: str, gate: Gate) -> None:
    prompts = [random_prompt(length, seed=9) for length in (17, 60, 90, 33)]
    assert_together_as_alone(llama_pair, prompts, CHOICES[name], gate)


@pytest.fixture(scope="module")
def default_pair() -> Iterator[Pair]:
    with running_pair(None) as pair:
        yield pair


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_four_clients_of_the_default_model_at_once_agree(default_pair: Pair, name: str, gate: Gate) -> None:
    prompts = [text_prompt(default_pair, length) for length in (30, 150, 250, 77)]
    assert_together_as_alone(default_pair, prompts, CHOICES[name], gate)


def test_another_prompts_kv_is_told_apart(llama_pair: Pair) -> None:
    """What a mix-up among clients would come to is far beyond what is allowed."""
    prompt, other = random_prompt(60, seed=9), random_prompt(60, seed=10)
    mine, theirs = (ask(llama_pair, one, samplings()[0], KvChoice()) for one in (prompt, other))
    assert disagreement(mine, theirs) > 100 * ALLOWED
