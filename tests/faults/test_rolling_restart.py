"""All workers are restarted, one after another, under load: no request is lost, and every answer is right."""

import threading
from pathlib import Path

import pytest

from spectrumkv.client.completion import Completion
from spectrumkv.client.request import KvChoice, Sampling, TokenIds
from tests.faults.deployment import NOTHING, until
from tests.faults.fleet import Fleet, restart_in_order, running_fleet
from tests.faults.report import tell
from tests.services.kv.test_lossless import random_prompt
from tests.tiny_models import tiny_model

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


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_rolling_restart_loses_no_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running_fleet(tmp_path, tiny_model("llama"), kv_memory="64MiB") as fleet:
        load = Load(fleet)
        for service in (fleet.decodes[0], fleet.prefills[0], fleet.decodes[1], fleet.prefills[1]):
            before = load.answers
            restart_in_order(service)
            until(lambda before=before: load.answers > before + CLIENTS, 60, "requests go on")
        load.stop()
        tell(capsys, f"{load.answers} requests while 4 workers restarted in turn, {len(load.errors)} lost")
        assert load.errors == []
        for service in fleet.services:
            until(lambda service=service: service.held() == NOTHING, 10, f"{service.name} holds nothing")
