"""A thousand calls that say nothing, on each of two real services, while an honest client asks for answers."""

import statistics
import time
from collections.abc import Iterator

import pytest

from spectrumkv.client.client import SpectrumClient
from spectrumkv.client.local.pair_config import FREE_PORTS
from spectrumkv.client.local.running_pair import RunningPair, running_pair
from tests.faults.connections.asking import ask
from tests.faults.connections.silent_streams import fill, silent_connections
from tests.faults.report import tell
from tests.tiny_models import tiny_model

HEALTH = ("/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch")
METHODS = {
    "prefill": (
        *HEALTH,
        "/spectrumkv.v1.PrefillService/Generate",
        "/spectrumkv.v1.PrefillService/GetServerInfo",
        "/spectrumkv.v1.PrefillService/Tokenize",
        "/spectrumkv.v1.PrefillService/Detokenize",
    ),
    "decode": (
        *HEALTH,
        "/spectrumkv.v1.DecodeService/Decode",
        "/spectrumkv.v1.DecodeService/PutBasis",
        "/spectrumkv.v1.DecodeService/GetServerInfo",
    ),
}
CONNECTIONS, STREAMS = 10, 100
REQUESTS, REFILLS = 20, 5
DEADLINE_EXCEEDED = "4"


def ask_all(client: SpectrumClient) -> float:
    """Return the seconds that a request takes, with the questions that a load balancer and an operator ask."""
    started = time.monotonic()
    assert client.is_serving()
    client.server_info(timeout=10)
    ask(client, timeout=10)
    return time.monotonic() - started


def median_of(client: SpectrumClient) -> float:
    return statistics.median(ask_all(client) for _ in range(REQUESTS))


@pytest.fixture(scope="module")
def pair() -> Iterator[RunningPair]:
    with running_pair({"model": str(tiny_model("llama")), "int4": "on", "kv_memory": "16MiB", **FREE_PORTS}) as one:
        yield one


@pytest.mark.slow
@pytest.mark.parametrize("service", ["prefill", "decode"])
def test_silent_calls_hold_nobody_up(pair: RunningPair, service: str, capsys: pytest.CaptureFixture[str]) -> None:
    address = str({"prefill": pair.prefill, "decode": pair.decode}[service].address)
    with SpectrumClient(pair.address) as client:
        median_of(client)
        quiet = median_of(client)
        with silent_connections(address, CONNECTIONS) as connections:
            fill(connections, METHODS[service], STREAMS)
            ask_all(client)
            attacked = median_of(client)
            for _ in range(REFILLS):
                # Those that were ended are opened again: nobody is refused, though refusals take their time.
                fill(connections, METHODS[service], STREAMS)
                ask_all(client)
            assert_others_come_in(address)
            assert all(one.is_connected for one in connections)
    tell(capsys, f"{service}: {quiet * 1e3:.1f} ms on a quiet day, {attacked * 1e3:.1f} ms beside silent calls")
    assert attacked <= 2 * quiet


def assert_others_come_in(address: str) -> None:
    """A client whose connection was not there before is served, too."""
    with SpectrumClient(address) as newcomer:
        assert newcomer.is_serving()


@pytest.mark.slow
def test_silent_calls_end_while_their_connection_stands(pair: RunningPair) -> None:
    """Each is over after 10 s at most, whichever RPC it was for."""
    with (
        silent_connections(str(pair.prefill.address), 1) as [to_prefill],
        silent_connections(str(pair.decode.address), 1) as [to_decode],
    ):
        started = time.monotonic()
        held = {"prefill": to_prefill, "decode": to_decode}
        for service, connection in held.items():
            fill([connection], METHODS[service], len(METHODS[service]))
        for service, connection in held.items():
            codes = [connection.ended.get(timeout=15) for _ in METHODS[service]]
            assert codes == [DEADLINE_EXCEEDED] * len(codes)
            assert connection.is_connected
        assert 9.0 < time.monotonic() - started < 12.0
