"""Callers that send nearly all of a message, and then nothing: what they may have a real service keep is bounded."""

import struct
from collections.abc import Iterator

import pytest

from spectrumkv.client.client import SpectrumClient
from spectrumkv.client.local.pair_config import FREE_PORTS
from spectrumkv.client.local.running_pair import RunningPair, running_pair
from spectrumkv.client.request import Sampling
from spectrumkv.common.rpc.server import PARTIAL_MESSAGE_BYTES
from tests.faults.connections.process import Process
from tests.faults.connections.silent_streams import silent_connections
from tests.faults.report import tell
from tests.tiny_models import tiny_model

METHODS = {"prefill": "/spectrumkv.v1.PrefillService/Generate", "decode": "/spectrumkv.v1.DecodeService/Decode"}
CONNECTIONS, STREAMS = 4, 80
# What the connections' own buffers may take besides.
SLACK_BYTES = 96 << 20


@pytest.fixture(scope="module")
def pair() -> Iterator[RunningPair]:
    with running_pair({"model": str(tiny_model("llama")), "int4": "on", "kv_memory": "16MiB", **FREE_PORTS}) as one:
        yield one


@pytest.mark.slow
@pytest.mark.parametrize("announced", [1 << 20, 8 << 20, (1 << 32) - 1], ids=["1 MiB", "8 MiB", "4 GiB"])
@pytest.mark.parametrize("service", METHODS)
def test_parts_of_messages_take_bounded_memory(
    pair: RunningPair, service: str, announced: int, capsys: pytest.CaptureFixture[str]
) -> None:
    part = struct.pack(">BI", 0, announced) + bytes(min(announced, 8 << 20) - 1)
    attacked = {"prefill": pair.prefill, "decode": pair.decode}[service]
    with (
        SpectrumClient(pair.address) as client,
        silent_connections(str(attacked.address), CONNECTIONS) as connections,
    ):
        client.generate("Hello", sampling=Sampling(max_tokens=4)).result()
        process, sent = Process(attacked.address.port), 0
        before = process.status("VmRSS") << 10
        for number in range(CONNECTIONS * STREAMS):
            connection = connections[number % CONNECTIONS]
            sent += connection.feed(connection.open(METHODS[service]), part, patience=0.05)
        grown = (process.status("VmRSS") << 10) - before
        assert client.generate("Hello", sampling=Sampling(max_tokens=4), timeout=10).result().tokens
    tell(capsys, f"{service}: {sent >> 20} MiB sent in parts of messages, {grown >> 20} MiB kept")
    assert grown < PARTIAL_MESSAGE_BYTES + SLACK_BYTES
