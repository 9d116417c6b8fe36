"""Floods of HTTP/2's own frames, and of calls, against real services with an honest client."""

import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from spectrumkv.client.client import SpectrumClient
from spectrumkv.client.local.pair_config import FREE_PORTS
from spectrumkv.client.local.running_pair import RunningPair, running_pair
from spectrumkv.common.errors import DeadlineExceededError, ResourceExhaustedError, UnavailableError
from tests.faults.connections.asking import ask
from tests.faults.connections.http2_floods import CALLS, FRAMES, send
from tests.faults.connections.process import Process
from tests.faults.report import tell
from tests.tiny_models import tiny_model

METHODS = {"prefill": "/spectrumkv.v1.PrefillService/GetServerInfo", "decode": "/spectrumkv.v1.DecodeService/Decode"}
CONNECTIONS, SECONDS = 3, 2.0
# What buffers of connections and calls may take.
GROWTH_BYTES = 128 << 20
# Each honest request, on a machine that the flood's senders keep busy, too.
LONGEST_SECONDS = 10.0
ANSWER_TOKENS = 8
REFUSALS = (ResourceExhaustedError, UnavailableError, DeadlineExceededError)

Flood = Callable[[str], Iterator[bytes]]


@pytest.fixture(scope="module")
def pair() -> Iterator[RunningPair]:
    with running_pair({"model": str(tiny_model("llama")), "int4": "on", "kv_memory": "16MiB", **FREE_PORTS}) as one:
        yield one


@contextmanager
def flooded(pair: RunningPair, service: str, flood: Flood, reads: bool) -> Iterator["list[Future[int]]"]:
    """Hold a flood of a service; in the end its memory has not grown, and somebody else is served."""
    attacked = {"prefill": pair.prefill, "decode": pair.decode}[service].address
    process = Process(attacked.port)
    before = process.status("VmRSS") << 10
    with ThreadPoolExecutor(CONNECTIONS) as attackers:
        yield [
            attackers.submit(send, (attacked.host, attacked.port), flood(METHODS[service]), SECONDS, reads)
            for _ in range(CONNECTIONS)
        ]
    grown = (process.status("VmRSS") << 10) - before
    with SpectrumClient(pair.address) as newcomer:
        newcomer.wait_until_serving(LONGEST_SECONDS)
        ask(newcomer, ANSWER_TOKENS, LONGEST_SECONDS)
    assert grown < GROWTH_BYTES


@pytest.mark.slow
@pytest.mark.parametrize("reads", [True, False], ids=["answers are read", "nothing is read"])
@pytest.mark.parametrize("service", METHODS)
@pytest.mark.parametrize("flood", FRAMES, ids=lambda flood: flood.__name__)
def test_a_flood_of_frames_holds_nobody_up(
    pair: RunningPair, flood: Flood, service: str, reads: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with SpectrumClient(pair.address) as client, flooded(pair, service, flood, reads) as floods:
        took = []
        while not all(one.done() for one in floods):
            took.append(ask(client, ANSWER_TOKENS, LONGEST_SECONDS))
    sent, median = sum(one.result() for one in floods), statistics.median(took)
    tell(capsys, f"{service}, {flood.__name__}: {sent / 1e6:.0f} MB, requests {median * 1e3:.0f} ms")


@pytest.mark.slow
@pytest.mark.parametrize("service", METHODS)
@pytest.mark.parametrize("flood", CALLS, ids=lambda flood: flood.__name__)
def test_a_flood_of_calls_is_over_when_it_ends(
    pair: RunningPair, flood: Flood, service: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Honest calls wait among the others, so that some may be refused; the service stands, and goes on."""
    with SpectrumClient(pair.address) as client, flooded(pair, service, flood, reads=True) as floods:
        served, refused = 0, 0
        while not all(one.done() for one in floods):
            try:
                ask(client, ANSWER_TOKENS, LONGEST_SECONDS)
            except REFUSALS:
                refused += 1
            else:
                served += 1
    sent = sum(one.result() for one in floods)
    tell(capsys, f"{service}, {flood.__name__}: {sent / 1e6:.0f} MB, {served} requests served, {refused} refused")
