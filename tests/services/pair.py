"""Both services on real sockets in this process, with a proxy between them."""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
from prometheus_client import CollectorRegistry

from spectrumkv.client.client import SpectrumClient
from spectrumkv.client.request import Sampling, TokenIds
from spectrumkv.common.kv.allocation import Int4Layers
from spectrumkv.common.kv.codecs.basis import Basis
from spectrumkv.common.model.load import LoadedModel, load_model
from spectrumkv.common.rpc.decode_methods import add_decode_servicer
from spectrumkv.common.rpc.server import Server
from spectrumkv.common.service.config import Address, DecodeConfig, PrefillConfig, build
from spectrumkv.common.telemetry.metrics import Metrics
from spectrumkv.decode_server.service import DecodeService
from spectrumkv.prefill_server.engine.engine import PrefillEngine
from spectrumkv.prefill_server.service import PrefillService
from spectrumkv.prefill_server.tuning.basis_cache import resolve_basis
from spectrumkv.prefill_server.verdict import ProbeVerdict
from spectrumkv.v1 import prefill_pb2_grpc
from tests.services.proxy import CountingProxy, counting_proxy

NOT_PROBED = ProbeVerdict(Int4Layers(), source="flag", reason="set by the test")


@dataclass(frozen=True)
class Pair:
    """A running prefill and decode service."""

    prefill: LoadedModel
    prefill_port: int
    decode_port: int
    prefill_metrics: Metrics
    decode_metrics: Metrics
    proxy: CountingProxy

    def client(self) -> SpectrumClient:
        return SpectrumClient(f"127.0.0.1:{self.prefill_port}")


def sample(metrics: Metrics, name: str, **labels: str) -> float:
    """A metric's value, 0 where it was never touched."""
    return metrics.registry.get_sample_value(f"spectrumkv_{name}", labels) or 0.0


def total(metrics: Metrics, name: str) -> float:
    """Sum of a metric over its labels."""
    return sum(
        one.value
        for family in metrics.registry.collect()
        for one in family.samples
        if one.name == f"spectrumkv_{name}"
    )


HELD = ("kv_bytes_resident", "kv_slots_used_ratio", "requests_running", "requests_waiting")


def wait_until_nothing_is_held(*services: Metrics, seconds: float) -> None:
    """Look at services' metrics until none holds KV or requests; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while any(total(metrics, name) for metrics in services for name in HELD):
        assert time.monotonic() < deadline, f"something is still held after {seconds:g} s"
        time.sleep(0.001)


@contextlib.contextmanager
def decode_server(model: Path | None, **options: str) -> Iterator[tuple[DecodeService, Metrics, int]]:
    metrics = Metrics(CollectorRegistry())
    config = build(DecodeConfig, {"listen": "127.0.0.1:0", **options})
    service = DecodeService(load_model(model and str(model), "cpu", "auto"), config, metrics)
    server = Server(
        add_decode_servicer,
        service,
        "spectrumkv.v1.DecodeService",
        threads=config.max_streams,
        count_ended=lambda code: metrics.requests.labels(code).inc(),
        most_message_bytes=service.most_message_bytes,
    )
    port = server.bind(str(config.listen))
    service.start()
    server.start()
    try:
        yield service, metrics, port
    finally:
        server.drain(0, threading.Event())
        service.stop()


@contextlib.contextmanager
def prefill_server(
    model: Path | None,
    decode_ports: list[int],
    verdict: ProbeVerdict = NOT_PROBED,
    basis: Basis | None = None,
    **options: str | bool,
) -> Iterator[tuple[LoadedModel, Metrics, int]]:
    metrics = Metrics(CollectorRegistry())
    addresses = ",".join(str(Address("127.0.0.1", port)) for port in decode_ports)
    config = build(PrefillConfig, {"listen": "127.0.0.1:0", "decode": addresses, **options})
    loaded = load_model(model and str(model), "cpu", "auto")
    engine = PrefillEngine(loaded, config.window)
    engine.start()
    basis = basis or resolve_basis(loaded, lambda done: None)
    service = PrefillService(loaded, config, metrics, engine, verdict, basis)
    server = Server(
        prefill_pb2_grpc.add_PrefillServiceServicer_to_server,
        service,
        "spectrumkv.v1.PrefillService",
        threads=config.max_waiting,
        count_ended=lambda code: metrics.requests.labels(code).inc(),
        most_message_bytes=service.most_message_bytes,
    )
    port = server.bind(str(config.listen))
    service.start()
    server.start()
    try:
        yield loaded, metrics, port
    finally:
        server.drain(0, threading.Event())
        service.stop()


@contextlib.contextmanager
def running_pair(
    model: Path | None,
    verdict: ProbeVerdict = NOT_PROBED,
    decode: dict[str, str] | None = None,
    prefill: dict[str, str] | None = None,
) -> Iterator[Pair]:
    with (
        decode_server(model, **(decode or {})) as (_, decode_metrics, decode_port),
        counting_proxy(decode_port) as proxy,
        prefill_server(model, [proxy.port], verdict, **(prefill or {})) as (loaded, metrics, port),
    ):
        pair = Pair(loaded, port, decode_port, metrics, decode_metrics, proxy)
        # The first request of a counted policy takes the codec's basis to decode, which is no request's own.
        with pair.client() as client:
            client.generate(TokenIds((5, 6, 7)), sampling=Sampling(max_tokens=2, ignore_eos=True)).result()
        yield pair


@contextlib.contextmanager
def failing_requests(service: DecodeService, error: Exception) -> Iterator[None]:
    """Have this worker fail each request that it has admitted, before token 2, until the block ends."""

    def fail(*_: object) -> NoReturn:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(service, "_generate", fail)
        yield


@contextlib.contextmanager
def failing_steps(service: DecodeService, error: Exception) -> Iterator[None]:
    """Have every step of this worker's model fail until the block ends."""

    def fail(rows: object) -> NoReturn:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(service._engine._runner, "logits", fail)
        yield


@contextlib.contextmanager
def slowed_steps(service: DecodeService, times: float) -> Iterator[None]:
    """Have every step of this worker's model take so many times as long until the block ends."""
    logits = service._engine._runner.logits

    def slowly(rows: Any) -> Any:
        started = time.monotonic()
        found = logits(rows)
        time.sleep((times - 1) * (time.monotonic() - started))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(service._engine._runner, "logits", slowly)
        yield
