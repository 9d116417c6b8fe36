"""Clients that never stop asking a fleet, while its services come and go."""

import threading

from spectrumkv.client.completion import Completion
from spectrumkv.client.request import KvChoice, Sampling, TokenIds
from tests.faults.fleet import Fleet
from tests.services.kv.test_lossless import random_prompt

CLIENTS = 4
PROMPTS = [TokenIds(tuple(random_prompt(length))) for length in (8, 40, 150, 400)]
# Greedy: where a draw falls between two tokens, the last bit of a batched step decides.
SAMPLING = Sampling(max_tokens=24, ignore_eos=True)


class Load:
    """Clients that ask again as soon as they have an answer, each over a connection of its own."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._enough = threading.Event()
        self.expected = [self._ask(prompt).token_ids for prompt in PROMPTS]
        self.answers = 0
        self.errors: list[str] = []
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._work, args=(number,)) for number in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._enough.set()
        for thread in self._threads:
            thread.join(90)
            assert not thread.is_alive(), "a request hangs"

    def _ask(self, prompt: TokenIds) -> Completion:
        with self._fleet.client() as client:
            return client.generate(prompt, sampling=SAMPLING, kv=KvChoice(policy="fp16"), timeout=60).result()

    def _work(self, number: int) -> None:
        with self._fleet.client() as client:
            while not self._enough.is_set():
                number = (number + 1) % len(PROMPTS)
                try:
                    stream = client.generate(
                        PROMPTS[number], sampling=SAMPLING, kv=KvChoice(policy="fp16"), timeout=60
                    )
                    assert stream.result().token_ids == self.expected[number]
                except Exception as error:  # noqa: BLE001  # reported by the test's own thread
                    self.errors.append(repr(error))
                with self._lock:
                    self.answers += 1
