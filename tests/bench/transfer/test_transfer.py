"""The transfer bench: every path delivers, and counts what it sent."""

import socket
import threading
from pathlib import Path

import pytest
import torch
from prometheus_client import CollectorRegistry

from spectrumkv.bench.flags import kv_choices
from spectrumkv.bench.main import build_parser, main
from spectrumkv.bench.models.synthetic_prompt import SyntheticCache, layer_captures
from spectrumkv.bench.transfer.kv import KvSender, ReceivingServicer
from spectrumkv.bench.transfer.measure import measure
from spectrumkv.bench.transfer.raw import TcpReceiver, TcpSender
from spectrumkv.client.request import KvChoice
from spectrumkv.common.errors import InvalidArgumentError, ResourceExhaustedError, UnavailableError
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.rpc.channel import open_channel
from spectrumkv.common.rpc.decode_methods import SERVICE_NAME, add_decode_servicer
from spectrumkv.common.rpc.server import Server
from spectrumkv.common.service.config import Address, PrefillConfig, build
from spectrumkv.common.telemetry.metrics import Metrics
from spectrumkv.decode_server.kv_pool import KvPool
from spectrumkv.prefill_server.transfer.plan import KvPlan
from spectrumkv.prefill_server.verdict import ProbeVerdict
from tests.common.security.certificates import Authority

GEOMETRY = KvGeometry(layers=3, kv_heads=2, head_dim=64, native_dtype=torch.float32)
TOKENS = 100
CHUNK_BYTES = 16 << 10


def plan(policy: str, budget: float | None = None) -> KvPlan:
    choice = KvChoice(policy=policy, budget=budget)
    return KvPlan.resolve(
        choice.to_proto(), build(PrefillConfig, {}), ProbeVerdict.from_flag("on", GEOMETRY.layers), seed=0
    )


@pytest.fixture(scope="module")
def cache() -> SyntheticCache:
    return SyntheticCache.random(GEOMETRY, TOKENS, torch.device("cpu"))


def test_every_path_between_two_processes(cache: SyntheticCache) -> None:
    plans = [plan("fp16"), plan("adaptive", 0.5), plan("adaptive", 0.3)]
    rows = measure(cache, layer_captures(cache, 4, 16), plans, CHUNK_BYTES, 2, lambda done: None)
    assert [row["path"] for row in rows] == [
        "raw-tcp-fp16",
        "grpc-fp16",
        *["spectrumkv"] * 3,
        # fp16 looks at no scores.
        *["spectrumkv-tiered"] * 2,
    ]
    assert rows[0]["ratio_to_raw_tcp"] == rows[0]["budget_counted"] == 1.0
    for row in rows:
        rate = GEOMETRY.fp16_bytes(TOKENS) / row["seconds"] / 1e9
        assert row["fp16_equivalent_gbps"] == pytest.approx(rate)
        assert row["ratio_to_raw_tcp"] == pytest.approx(rate / rows[0]["fp16_equivalent_gbps"])
    counted = [row["budget_counted"] for row in rows]
    assert 1.0 < counted[1] < 1.01
    assert 1.0 < counted[2] < 1.02
    assert counted[3] == pytest.approx(0.5, abs=0.05)
    assert counted[4] == pytest.approx(0.3, abs=0.05)
    # The same bytes, whoever settled the tiers; at 0.5 and 0.3 again. Chunks may be cut elsewhere.
    assert counted[5:] == pytest.approx(counted[3:5], abs=1e-3)


def test_mutual_tls_beside_plaintext(cache: SyntheticCache, tmp_path: Path) -> None:
    authority = Authority("bench")
    files = authority.issue().write(tmp_path / "tls", authority)
    rows = measure(cache, layer_captures(cache, 4, 16), [plan("fp16")], CHUNK_BYTES, 2, lambda done: None, files)
    assert [row["path"] for row in rows] == [
        "raw-tcp-fp16",
        "grpc-fp16",
        "spectrumkv",
        "grpc-fp16-mutual-tls",
        "spectrumkv-mutual-tls",
    ]
    for plain, encrypted in zip(rows[1:3], rows[3:], strict=True):
        assert plain["ratio_to_plaintext"] is None
        assert encrypted["budget_counted"] == plain["budget_counted"]
        ratio = encrypted["fp16_equivalent_gbps"] / plain["fp16_equivalent_gbps"]
        assert encrypted["ratio_to_plaintext"] == pytest.approx(ratio)


def test_half_of_mutual_tls_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["transfer", "--tls-cert", "cert.pem"]) == 1
    assert "all three" in capsys.readouterr().err


def test_the_kv_lies_in_the_receivers_slots(cache: SyntheticCache) -> None:
    metrics = Metrics(CollectorRegistry())
    pool = KvPool(
        GEOMETRY, TOKENS * GEOMETRY.layers * GEOMETRY.native_bytes_per_token_layer, torch.device("cpu"), metrics
    )
    pool.keys.fill_(torch.nan)
    pool.values.fill_(torch.nan)
    server = Server(
        add_decode_servicer, ReceivingServicer(pool, metrics), SERVICE_NAME, 4, count_ended=lambda code: None
    )
    port = server.bind("127.0.0.1:0")
    server.start()
    try:
        with open_channel(f"127.0.0.1:{port}") as channel:
            sender = KvSender(channel, layer_captures(cache, 2, 8), plan("native"), cache, CHUNK_BYTES)
            for _ in range(2):
                sending = sender.send()
                assert sending.seconds > 0
            assert torch.equal(pool.keys[:, :, :TOKENS], torch.stack(cache.keys))
            assert torch.equal(pool.values[:, :, :TOKENS], torch.stack(cache.values))
            assert pool.used == 0
            with pool.reserve(1), pytest.raises(ResourceExhaustedError):
                sender.send()
    finally:
        server.drain(0, threading.Event())


def test_tcp_delivers_message_after_message() -> None:
    message = bytes(range(256)) * 5000
    receiver = TcpReceiver("127.0.0.1", len(message))
    with TcpSender(Address("127.0.0.1", receiver.port), memoryview(message)) as send:
        assert all(send() > 0 for _ in range(3))
    assert receiver.buffer == message


def test_a_tcp_receiver_that_hangs_up_is_reported() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = Address("127.0.0.1", listener.getsockname()[1])
        with TcpSender(address, memoryview(bytes(1 << 20))) as send:
            listener.accept()[0].close()
            with pytest.raises(UnavailableError, match="TCP receiver"):
                send()


def test_choices_are_policies_at_the_budgets_that_they_keep_to() -> None:
    flags = ("--policies", "native,adaptive,uniform-int8", "--budgets", "0.5,0.3")
    parsed = build_parser().parse_args(["transfer", *flags])
    assert [(one.policy, one.budget) for one in kv_choices(parsed)] == [
        ("native", None),
        ("adaptive", 0.5),
        ("adaptive", 0.3),
        ("uniform-int8", 0.5),
    ]


def test_an_observed_window_fits_the_prompt(cache: SyntheticCache) -> None:
    with pytest.raises(InvalidArgumentError, match="--window is 101"):
        layer_captures(cache, 4, TOKENS + 1)


def test_an_unknown_policy_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["transfer", "--tokens", "64", "--layers", "1", "--policies", "gready"]) == 1
    assert "unknown policy 'gready'" in capsys.readouterr().err
