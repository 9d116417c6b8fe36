"""A decode worker's gRPC drops streams where too many calls wait for it: prefill asks the same worker again."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from spectrumkv.client.client import SpectrumClient
from spectrumkv.client.request import Sampling, TokenIds
from spectrumkv.common.errors import UnavailableError
from spectrumkv.common.rpc.attempts import ATTEMPTS
from spectrumkv.prefill_server.workers import lease
from tests.services.pair import decode_server, prefill_server, total

PROMPT = TokenIds(tuple(range(100, 132)))
SAMPLING = Sampling(max_tokens=4, ignore_eos=True)


class Dropped(grpc.RpcError):  # type: ignore[misc]  # grpc has no type information
    """What a caller reads of a call that the server's gRPC dropped."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.CANCELLED

    def details(self) -> str:
        return "CANCELLED"


class Drops:
    """Lets so many streams seem dropped before they are admitted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, streams: int) -> None:
        self.left, self.asked = streams, 0
        admitted = lease.expect_admitted

        def expect_admitted(call: Any) -> None:
            self.asked += 1
            if self.left:
                self.left -= 1
                raise Dropped
            admitted(call)

        monkeypatch.setattr(lease, "expect_admitted", expect_admitted)


@pytest.fixture
def asked(tiny_directories: dict[str, Path]) -> Iterator[tuple[SpectrumClient, Any]]:
    model = tiny_directories["llama"]
    with (
        decode_server(model, kv_memory="12MiB") as (_, _, decode_port),
        prefill_server(model, [decode_port]) as (_, metrics, port),
        SpectrumClient(f"127.0.0.1:{port}") as client,
    ):
        yield client, metrics


def test_the_only_worker_is_asked_again(asked: tuple[SpectrumClient, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    client, metrics = asked
    drops = Drops(monkeypatch, 2)
    assert len(client.generate(PROMPT, sampling=SAMPLING).result().tokens) == 4
    assert drops.asked == 3
    assert total(metrics, "decode_workers_passed_over_total") == 0


def test_a_worker_that_drops_each_stream_is_unavailable(
    asked: tuple[SpectrumClient, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, _ = asked
    drops = Drops(monkeypatch, ATTEMPTS)
    with pytest.raises(UnavailableError, match="too many calls wait for it, or it is stopping"):
        client.generate(PROMPT, sampling=SAMPLING).result()
    assert drops.asked >= ATTEMPTS
