"""Decode workers get the basis of the spectral codec beside the requests, whoever comes and goes meanwhile."""

import contextlib
import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from spectrumkv.client.client import CompletionStream, SpectrumClient
from spectrumkv.client.request import KvChoice, Sampling, TokenIds
from spectrumkv.common.model.load import load_model
from spectrumkv.common.rpc.decode_methods import ArrivedPiece, ask_for_basis
from spectrumkv.common.rpc.server import UPLOADS
from spectrumkv.common.telemetry.metrics import Metrics
from spectrumkv.decode_server.bases import BasisStore
from spectrumkv.prefill_server.tuning.basis_cache import resolve_basis
from spectrumkv.prefill_server.workers import basis_upload
from spectrumkv.v1 import decode_pb2, decode_pb2_grpc
from tests.services.kv.test_lossless import random_prompt
from tests.services.pair import decode_server, prefill_server, sample, total
from tests.waiting import until

SPECTRAL = KvChoice(policy="spectral", budget=0.4)
# No other codec may stand in, however long the basis takes.
NAMED = KvChoice(policy="spectral", budget=0.4, codec="spectral")
WAIT_SECONDS = 30.0


def test_a_burst_of_first_requests_sends_it_once_and_all_are_served(tiny_directories: dict[str, Path]) -> None:
    requests = 3 * UPLOADS
    with spectral_pair(tiny_directories["llama"]) as pair, ThreadPoolExecutor(requests) as clients:
        list(clients.map(lambda _: pair.ask(), range(requests)))
        sent = sample(pair.prefill, "kv_bytes_sent_total", tier="basis")
        assert sent == sample(pair.decode, "kv_bytes_received_total", tier="basis")
        pair.ask()
        assert sample(pair.prefill, "kv_bytes_sent_total", tier="basis") == sent > 0
        assert total(pair.prefill, "decode_workers_passed_over_total") == 0


def test_a_worker_gets_it_before_any_request_asks(tiny_directories: dict[str, Path]) -> None:
    with spectral_pair(tiny_directories["llama"]) as pair:
        until(lambda: sample(pair.decode, "kv_bytes_received_total", tier="basis") > 0)
        assert total(pair.prefill, "requests_total") == 0


class SlowUploads:
    """Uploads whose bytes decode takes only once they are let go; questions are answered at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.arriving, self.go_on = threading.Semaphore(0), threading.Event()
        self._receive = BasisStore.receive
        monkeypatch.setattr(BasisStore, "receive", lambda store, pieces: self._slowly(store, pieces))

    def _slowly(self, store: BasisStore, pieces: Iterator[ArrivedPiece]) -> int:
        first = next(pieces)
        assert isinstance(first, decode_pb2.PutBasisRequest)
        if first.part:
            self.arriving.release()
            assert self.go_on.wait(WAIT_SECONDS)
        return self._receive(store, itertools.chain([first], pieces))


def test_who_leaves_while_it_is_sent_takes_nothing_from_the_others(
    tiny_directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads = SlowUploads(monkeypatch)
    with spectral_pair(tiny_directories["llama"]) as pair, ThreadPoolExecutor(1) as other:
        assert uploads.arriving.acquire(timeout=WAIT_SECONDS)
        leaving = pair.begin(NAMED)
        staying = other.submit(pair.ask, NAMED)
        until(lambda: total(pair.prefill, "requests_running") == 2)
        leaving.cancel()
        until(lambda: total(pair.prefill, "requests_running") == 1)
        uploads.go_on.set()
        staying.result(timeout=WAIT_SECONDS)
        assert not uploads.arriving.acquire(blocking=False)


@pytest.mark.slow
def test_deadlines_shorter_than_the_upload_are_met_after_a_restart_of_decode(
    tiny_directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The upload goes on beside the requests, whose KV another codec writes meanwhile, and says so."""
    model = tiny_directories["llama"]
    with contextlib.ExitStack() as running:
        with decode_server(model, kv_memory="64MiB") as (_, first, port):
            _, prefill, prefill_port = running.enter_context(prefill_server(model, [port]))
            client = running.enter_context(SpectrumClient(f"127.0.0.1:{prefill_port}"))
            pair = SpectralPair(client, prefill, first, port)
            pair.ask()
        uploads = SlowUploads(monkeypatch)
        _, second, _ = running.enter_context(decode_server(model, kv_memory="64MiB", listen=f"127.0.0.1:{port}"))
        assert uploads.arriving.acquire(timeout=WAIT_SECONDS)
        with ThreadPoolExecutor(24) as clients:
            answers = list(clients.map(lambda _: pair.begin(timeout=6.0).result(), range(24)))
        assert {answer.usage.codec for answer in answers} == {"absmax"}
        assert {answer.usage.codec_reason for answer in answers} == {
            f"127.0.0.1:{port} has not received the codec's basis yet"
        }
        uploads.go_on.set()
        until(lambda: sample(second, "kv_bytes_received_total", tier="basis") > 0)
        pair.ask()
        assert not uploads.arriving.acquire(blocking=False)


def test_a_request_goes_to_a_worker_that_has_it(
    tiny_directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the other worker, whose upload is under way, has more room."""
    model = tiny_directories["llama"]
    with contextlib.ExitStack() as running:
        _, having, having_port = running.enter_context(decode_server(model, kv_memory="12MiB"))
        with prefill_server(model, [having_port]) as (_, _, port), SpectrumClient(f"127.0.0.1:{port}") as client:
            SpectralPair(client, having, having, having_port).ask()
        uploads = SlowUploads(monkeypatch)
        running.callback(uploads.go_on.set)
        _, _, lacking_port = running.enter_context(decode_server(model, kv_memory="64MiB"))
        _, metrics, port = running.enter_context(prefill_server(model, [lacking_port, having_port]))
        assert uploads.arriving.acquire(timeout=WAIT_SECONDS)
        until(lambda: total(metrics, "decode_worker_accepting") == 2)
        client = running.enter_context(SpectrumClient(f"127.0.0.1:{port}"))
        pair = SpectralPair(client, metrics, having, having_port)
        assert pair.begin(NAMED).result().usage.decode_worker == f"127.0.0.1:{having_port}"
        assert sample(metrics, "kv_bytes_sent_total", tier="basis") == 0
        uploads.go_on.set()


@pytest.mark.slow
def test_five_kinds_of_prefill_hosts_each_send_theirs_once(tiny_directories: dict[str, Path]) -> None:
    """Calibration gives other bytes on other machines: here, means that differ by less than any key's noise."""
    model = tiny_directories["llama"]
    found = resolve_basis(load_model(str(model), "cpu", "auto"), lambda done: None)
    with contextlib.ExitStack() as running:
        _, decode, decode_port = running.enter_context(decode_server(model, kv_memory="64MiB"))
        pairs = []
        for kind in range(5):
            basis = replace(found, mean=found.mean + kind * 1e-6)
            _, prefill, port = running.enter_context(prefill_server(model, [decode_port], basis=basis))
            client = running.enter_context(SpectrumClient(f"127.0.0.1:{port}"))
            pairs.append(SpectralPair(client, prefill, decode, decode_port))
        for _ in range(3):
            for pair in pairs:
                pair.ask()
        sent = [sample(pair.prefill, "kv_bytes_sent_total", tier="basis") for pair in pairs]
        assert len(set(sent)) == 1
        assert sample(decode, "kv_bytes_received_total", tier="basis") == sum(sent)
        assert sent[0] < 2 * len(found.serialized)


@pytest.mark.slow
def test_uploads_of_others_are_waited_for(tiny_directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = threading.Semaphore(0)

    def counted(*of_upload: Any) -> Any:
        attempts.release()
        return ask_for_basis(*of_upload)

    monkeypatch.setattr(basis_upload, "ask_for_basis", counted)
    model = tiny_directories["llama"]
    with (
        decode_server(model, kv_memory="64MiB") as (_, decode, decode_port),
        unfinished_uploads(decode_port, monkeypatch) as uploads,
        prefill_server(model, [decode_port]) as (_, prefill, port),
        SpectrumClient(f"127.0.0.1:{port}") as spectrum_client,
        ThreadPoolExecutor(1) as client,
    ):
        pair = SpectralPair(spectrum_client, prefill, decode, decode_port)
        answer = client.submit(pair.ask, NAMED)
        for _ in range(2):
            assert attempts.acquire(timeout=WAIT_SECONDS)
        uploads.end()
        answer.result(timeout=WAIT_SECONDS)
        assert total(pair.prefill, "decode_workers_passed_over_total") == 0


def test_uploads_are_bounded_and_their_places_come_back(
    tiny_directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        decode_server(tiny_directories["llama"], kv_memory="64MiB") as (_, metrics, port),
        unfinished_uploads(port, monkeypatch) as uploads,
    ):
        with pytest.raises(grpc.RpcError) as raised:
            uploads.stub.PutBasis(iter([decode_pb2.PutBasisRequest(digest=bytes(32), part=b"x")]), timeout=30)
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "uploads" in raised.value.details()
        uploads.end()
        for one in uploads.held:
            # All of them came to their end: what they sent is no basis.
            assert one.code() is grpc.StatusCode.DATA_LOSS
        assert sample(metrics, "chunks_rejected_total", reason="basis") >= UPLOADS


class Uploads:
    """As many uploads as a decode worker serves, begun and not ended."""

    def __init__(self, channel: grpc.Channel, arrived: threading.Semaphore) -> None:
        self._stop = threading.Event()
        self.stub = decode_pb2_grpc.DecodeServiceStub(channel)
        self.held = [self.stub.PutBasis.future(self._unfinished(), timeout=60) for _ in range(UPLOADS)]
        for _ in self.held:
            assert arrived.acquire(timeout=WAIT_SECONDS)

    def end(self) -> None:
        self._stop.set()

    def _unfinished(self) -> Iterator[decode_pb2.PutBasisRequest]:
        yield decode_pb2.PutBasisRequest(digest=bytes(32), part=b"x")
        self._stop.wait(60)


@contextlib.contextmanager
def unfinished_uploads(port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Uploads]:
    """Yield the uploads once each has its place at decode; a piece that was sent need not have arrived."""
    arrived = threading.Semaphore(0)
    receive = BasisStore.receive

    def arriving(store: BasisStore, pieces: Iterator[ArrivedPiece]) -> int:
        arrived.release()
        return receive(store, pieces)

    monkeypatch.setattr(BasisStore, "receive", arriving)
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        uploads = Uploads(channel, arrived)
        try:
            yield uploads
        finally:
            uploads.end()


@dataclass(frozen=True)
class SpectralPair:
    """Both services, and a client of prefill."""

    client: SpectrumClient
    prefill: Metrics
    decode: Metrics
    decode_port: int

    def begin(self, kv: KvChoice = SPECTRAL, timeout: float = WAIT_SECONDS) -> CompletionStream:
        prompt = TokenIds(tuple(random_prompt(60)))
        return self.client.generate(prompt, sampling=Sampling(max_tokens=2, ignore_eos=True), kv=kv, timeout=timeout)

    def ask(self, kv: KvChoice = SPECTRAL) -> None:
        assert self.begin(kv).result().usage.codec == "spectral"


@contextlib.contextmanager
def spectral_pair(model: Path) -> Iterator[SpectralPair]:
    with (
        decode_server(model, kv_memory="64MiB") as (_, decode, decode_port),
        prefill_server(model, [decode_port]) as (_, prefill, port),
        SpectrumClient(f"127.0.0.1:{port}") as client,
    ):
        yield SpectralPair(client, prefill, decode, decode_port)
