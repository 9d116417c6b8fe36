"""Bytes on the wire flipped, lost, doubled or swapped below gRPC: right tokens or a status, never wrong tokens."""

import random
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from spectrumkv.client.client import SpectrumClient
from spectrumkv.client.request import KvChoice, Sampling, TokenIds
from spectrumkv.common.errors import SpectrumKVError
from spectrumkv.common.telemetry.metrics import Metrics
from tests.faults.damage.damage import flipped
from tests.faults.deployment import until
from tests.faults.link import TOWARDS_CLIENT, TOWARDS_SERVER, Link
from tests.faults.report import tell
from tests.services.pair import decode_server, prefill_server, total
from tests.tiny_models import tiny_model

TOKENS = 8
# Damage to HTTP/2's own lengths makes a peer wait for bytes that never come; then the deadline is the end.
TIMEOUT_SECONDS = 5.0
SHORT_RUN, LONG_RUN, EXHAUSTIVE_RUN = 12, 120, 300

Harm = Callable[[bytes, int, random.Random], bytes]

HARMS: dict[str, Harm] = {
    "flip": lambda data, at, chance: data[:at] + flipped(data[at : at + 1], chance) + data[at + 1 :],
    "lose": lambda data, at, chance: data[:at] + data[at + chance.randint(1, 64) :],
    "double": lambda data, at, chance: data[: at + chance.randint(1, 64)] + data[at:],
    "swap": lambda data, at, chance: data[:at] + data[at + 16 : at + 32] + data[at : at + 16] + data[at + 32 :],
}


class HarmfulLink(Link):
    """A link that harms the bytes around one place, once."""

    def __init__(self, target_port: int) -> None:
        self._planned: tuple[str, int, Callable[[bytes, int], bytes]] | None = None
        super().__init__(target_port)

    def passed(self, direction: str) -> int:
        with self._changed:
            return self._passed[direction]

    def harm(self, direction: str, after_bytes: int, how: Callable[[bytes, int], bytes]) -> None:
        with self._changed:
            self._planned = (direction, self._passed[direction] + after_bytes, how)

    def _forward(self, sink: socket.socket, data: bytes, direction: str) -> None:
        with self._changed:
            if self._planned is not None and self._planned[0] == direction:
                at = self._planned[1] - self._passed[direction]
                if at < len(data):
                    data, self._planned = self._planned[2](data, max(at, 0)), None
        super()._forward(sink, data, direction)


@dataclass
class Wired:
    """Both services with a harmful link between them."""

    link: HarmfulLink
    prefill_port: int
    metrics: tuple[Metrics, Metrics]

    def ask(self) -> tuple[list[int], str]:
        tokens: list[int] = []
        with SpectrumClient(f"127.0.0.1:{self.prefill_port}") as client:
            stream = client.generate(
                TokenIds(tuple(range(100, 160))),
                sampling=Sampling(max_tokens=TOKENS, ignore_eos=True),
                kv=KvChoice(policy="greedy", budget=0.6),
                timeout=TIMEOUT_SECONDS,
            )
            try:
                tokens.extend(token.token_id for token in stream)
            except SpectrumKVError as error:
                return tokens, error.code
        return tokens, "OK"

    def quiet(self) -> bool:
        names = ("kv_bytes_resident", "requests_running", "requests_waiting")
        return sum(total(one, name) for one in self.metrics for name in names) == 0


@pytest.fixture(scope="module")
def wired() -> Iterator[Wired]:
    model = tiny_model("llama")
    with decode_server(model, kv_memory="16MiB") as (_, decode_metrics, decode_port):
        link = HarmfulLink(decode_port)
        with prefill_server(model, [link.port], chunk_bytes="4096") as (_, prefill_metrics, port):
            yield Wired(link, port, (prefill_metrics, decode_metrics))
        link.close()


def harm_some(wired: Wired, times: int, seed: int) -> Counter[str]:
    """Harm one place a request; return how often which status came of it."""
    chance = random.Random(seed)
    expected = clean(wired)
    lengths = {direction: wired.link.passed(direction) for direction in (TOWARDS_SERVER, TOWARDS_CLIENT)}
    clean(wired)
    lengths = {direction: wired.link.passed(direction) - before for direction, before in lengths.items()}
    statuses: Counter[str] = Counter()
    for _ in range(times):
        direction = chance.choice((TOWARDS_SERVER, TOWARDS_SERVER, TOWARDS_CLIENT))
        how = HARMS[chance.choice(list(HARMS))]
        wired.link.harm(
            direction, chance.randrange(lengths[direction]), lambda data, at, how=how: how(data, at, chance)
        )
        tokens, status = wired.ask()
        statuses[status] += 1
        assert tokens == expected[: len(tokens)], f"wrong tokens, seed {seed}"
        assert status != "OK" or tokens == expected
        wired.link.reset()
        until(wired.quiet, TIMEOUT_SECONDS + 5, "nothing is held")
    assert clean(wired) == expected
    return statuses


def clean(wired: Wired) -> list[int]:
    """What comes without harm, once prefill has found its way to decode again."""
    answers: list[list[int]] = []

    def served() -> bool:
        tokens, status = wired.ask()
        answers.append(tokens)
        return status == "OK"

    until(served, 20, "an honest request is served")
    return answers[-1]


def test_harmed_bytes(wired: Wired) -> None:
    assert harm_some(wired, SHORT_RUN, seed=1).total() == SHORT_RUN


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("places", [LONG_RUN, pytest.param(EXHAUSTIVE_RUN, marks=pytest.mark.exhaustive)])
def test_many_harmed_bytes(wired: Wired, places: int, capsys: pytest.CaptureFixture[str]) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    statuses = harm_some(wired, places, seed)
    tell(capsys, f"{places} places harmed on the wire, seed {seed}, answers {dict(statuses)}")
