"""Whatever a man in the middle does to messages ends in DATA_LOSS, and nothing wrong reaches the client."""

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from spectrumkv.client.client import SpectrumClient
from spectrumkv.client.request import KvChoice, Sampling, TokenIds
from spectrumkv.common.errors import SpectrumKVError
from spectrumkv.common.telemetry.metrics import Metrics
from spectrumkv.prefill_server.workers import lease as decode_lease
from tests.faults.damage.damage import DAMAGES, ManInTheMiddle, man_in_the_middle, untouched
from tests.faults.report import tell
from tests.services.pair import decode_server, prefill_server, total, wait_until_nothing_is_held
from tests.tiny_models import tiny_model

TOKENS = 6
PROMPT = TokenIds(tuple(range(100, 180)))
RUN, EXHAUSTIVE_RUN = 400, 1500
# Where prefill waits for Admitted, silence is all there is to notice.
SILENT = {("requests", "drop", 0), ("requests", "reorder", 0), ("responses", "drop", 0), ("responses", "reorder", 0)}


@dataclass
class Tampered:
    """Both services with a man between them, and what a request gets when he does nothing."""

    man: ManInTheMiddle
    prefill_port: int
    prefill_metrics: Metrics
    decode_metrics: Metrics
    expected: tuple[int, ...] = ()

    def ask(self) -> tuple[list[int], str]:
        """Send the request; return the tokens that came and the status."""
        tokens: list[int] = []
        with SpectrumClient(f"127.0.0.1:{self.prefill_port}") as client:
            stream = client.generate(
                PROMPT,
                sampling=Sampling(max_tokens=TOKENS, ignore_eos=True),
                kv=KvChoice(policy="greedy", budget=0.6),
                timeout=30,
            )
            try:
                tokens.extend(token.token_id for token in stream)
            except SpectrumKVError as error:
                return tokens, error.code
        return tokens, "OK"

    def rejected(self) -> float:
        return sum(total(one, "chunks_rejected_total") for one in (self.prefill_metrics, self.decode_metrics))


@pytest.fixture(scope="module")
def tampered() -> Iterator[Tampered]:
    model = tiny_model("llama")
    with (
        decode_server(model, kv_memory="16MiB") as (_, decode_metrics, decode_port),
        man_in_the_middle(decode_port) as man,
        prefill_server(model, [man.port], chunk_bytes="4096") as (_, prefill_metrics, port),
    ):
        pair = Tampered(man, port, prefill_metrics, decode_metrics)
        tokens, status = pair.ask()
        assert status == "OK"
        assert len(tokens) == TOKENS
        pair.expected = tuple(tokens)
        # Begin, a handful of chunks, End; Admitted, tokens from the second on, Finished.
        assert man.request_count >= 5
        assert man.response_count == TOKENS + 1
        yield pair


def assert_found(pair: Tampered, direction: str, damage: str, at: int, chance: random.Random) -> None:
    before = pair.rejected()
    silent = (direction, damage, at) in SILENT
    with pytest.MonkeyPatch.context() as patch:
        if silent:
            # Anywhere else a worker that is slow to admit, on a machine that is busy, would look like a silent one.
            patch.setattr(decode_lease, "ADMISSION_SECONDS", 0.5)
        pair.man.harm(direction, DAMAGES[damage], at, chance)
        tokens, status = pair.ask()
    pair.man.requests = pair.man.responses = untouched
    if silent:
        assert status == "UNAVAILABLE"
        assert pair.rejected() == before
    else:
        assert status == "DATA_LOSS", f"{damage} of {direction}[{at}]: {status}"
        assert pair.rejected() >= before + 1
    if direction == "requests":
        assert len(tokens) <= 1
    assert tuple(tokens) == pair.expected[: len(tokens)]
    wait_until_nothing_is_held(pair.prefill_metrics, pair.decode_metrics, seconds=5)


@pytest.mark.parametrize("place", ["Begin", "first chunk", "a chunk between", "last chunk", "End"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_requests_are_found_before_token_2(tampered: Tampered, damage: str, place: str) -> None:
    count = clean_counts(tampered)[0]
    at = {"Begin": 0, "first chunk": 1, "a chunk between": count // 2, "last chunk": count - 2, "End": count - 1}[
        place
    ]
    assert_found(tampered, "requests", damage, at, random.Random(f"{damage} {place}"))


@pytest.mark.parametrize(
    "at", [0, 1, 3, TOKENS - 1, TOKENS], ids=["Admitted", "token 2", "token", "last", "Finished"]
)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_answers_never_reach_the_client(tampered: Tampered, damage: str, at: int) -> None:
    assert_found(tampered, "responses", damage, at, random.Random(f"{damage} {at}"))


def test_late_messages_do_no_harm(tampered: Tampered) -> None:
    def delayed(messages: Iterator[bytes]) -> Iterator[bytes]:
        for message in messages:
            time.sleep(0.02)
            yield message

    tampered.man.requests = tampered.man.responses = delayed  # type: ignore[assignment]
    assert tampered.ask() == (list(tampered.expected), "OK")
    tampered.man.requests = tampered.man.responses = untouched


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("damages", [RUN, pytest.param(EXHAUSTIVE_RUN, marks=pytest.mark.exhaustive)])
def test_random_damages(tampered: Tampered, damages: int, capsys: pytest.CaptureFixture[str]) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    chance = random.Random(seed)
    requests, responses = clean_counts(tampered)
    tell(capsys, f"{damages} damaged messages, seed {seed}")
    for _ in range(damages):
        direction = chance.choice(("requests", "responses"))
        # A man who keeps Begin or Admitted costs a wait each time; the tests above have it.
        first, count = (1, requests) if direction == "requests" else (1, responses)
        assert_found(tampered, direction, chance.choice(list(DAMAGES)), chance.randrange(first, count), chance)


def clean_counts(pair: Tampered) -> tuple[int, int]:
    """How many requests and responses the stream has."""
    assert pair.ask() == (list(pair.expected), "OK")
    return pair.man.request_count, pair.man.response_count
