"""Floods of HTTP/2's own frames against real services, while an honest client's requests go on."""

import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from spectrumkv.client.client import SpectrumClient
from spectrumkv.client.local.pair_config import FREE_PORTS
from spectrumkv.client.local.running_pair import RunningPair, running_pair
from spectrumkv.client.request import Sampling, TokenIds
from tests.faults.connections.http2_floods import FLOODS, send
from tests.faults.connections.process import Process
from tests.faults.report import tell
from tests.tiny_models import tiny_model

METHODS = {"prefill": "/spectrumkv.v1.PrefillService/GetServerInfo", "decode": "/spectrumkv.v1.DecodeService/Decode"}
CONNECTIONS, SECONDS = 3, 2.0
# What buffers of connections and calls may take.
GROWTH_BYTES = 128 << 20
# Each honest request, on a machine that the flood's senders keep busy, too.
LONGEST_SECONDS = 5.0
PROMPT = TokenIds(tuple(range(100, 148)))


@pytest.fixture(scope="module")
def pair() -> Iterator[RunningPair]:
    with running_pair({"model": str(tiny_model("llama")), "int4": "on", "kv_memory": "16MiB", **FREE_PORTS}) as one:
        yield one


def ask(client: SpectrumClient) -> float:
    started = time.monotonic()
    sampling = Sampling(max_tokens=8, ignore_eos=True)
    assert len(client.generate(PROMPT, sampling=sampling, timeout=20).result().tokens) == 8
    return time.monotonic() - started


@pytest.mark.slow
@pytest.mark.parametrize("reads", [True, False], ids=["answers are read", "nothing is read"])
@pytest.mark.parametrize("service", METHODS)
@pytest.mark.parametrize("flood", FLOODS, ids=lambda flood: flood.__name__)
def test_a_flood_holds_nobody_up(
    pair: RunningPair,
    flood: Callable[[str], Iterator[bytes]],
    service: str,
    reads: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    attacked = {"prefill": pair.prefill, "decode": pair.decode}[service].address
    process = Process(attacked.port)
    with SpectrumClient(pair.address) as client, ThreadPoolExecutor(CONNECTIONS) as attackers:
        ask(client)
        before = process.status("VmRSS") << 10
        target = (attacked.host, attacked.port)
        floods = [attackers.submit(send, target, flood(METHODS[service]), SECONDS, reads) for _ in range(CONNECTIONS)]
        took = []
        while not all(one.done() for one in floods):
            took.append(ask(client))
        grown = (process.status("VmRSS") << 10) - before
        with SpectrumClient(pair.address) as newcomer:
            ask(newcomer)
    sent = sum(one.result() for one in floods)
    tell(
        capsys,
        f"{service}, {flood.__name__}: {sent / 1e6:.0f} MB, requests {statistics.median(took) * 1e3:.0f} ms "
        f"(longest {max(took) * 1e3:.0f}), {grown >> 20} MiB more",
    )
    assert max(took) < LONGEST_SECONDS
    assert grown < GROWTH_BYTES
