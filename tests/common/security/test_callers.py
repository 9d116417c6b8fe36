"""Callers by the names of their certificates: who may bring work, and what the log says."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc

from spectrumkv.common.errors import PermissionDeniedError
from spectrumkv.common.rpc.channel import open_channel
from spectrumkv.common.rpc.server import Server
from spectrumkv.common.security import ChannelSecurity, ServerSecurity, TlsFiles
from spectrumkv.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc
from tests.common.rpc.scripted import WAIT_SECONDS
from tests.common.security.certificates import Authority
from tests.common.security.guarded import guarded

OURS = Authority("ours")
REFUSED = grpc.StatusCode.PERMISSION_DENIED


def caller(folder: Path, name: str) -> ChannelSecurity:
    """Somebody whose certificate is good and has a name."""
    files = OURS.issue(name).write(folder / name, OURS)
    return ChannelSecurity(TlsFiles(files.cert, files.key, files.ca))


def server_for(folder: Path, *names: str) -> ServerSecurity:
    return ServerSecurity(
        OURS.issue("server").write(folder / "server", OURS), verify_clients=True, client_names=frozenset(names)
    )


def test_only_callers_on_the_list_bring_work(tmp_path: Path) -> None:
    with guarded(server_for(tmp_path, "prefill", "other")) as server:
        assert server.ask(caller(tmp_path, "prefill")) == "yes"
        refusal = server.refusal(caller(tmp_path, "stranger"))
        assert isinstance(refusal, PermissionDeniedError)
        assert "its certificate's names: stranger" in refusal.message
        assert server.codes == ["OK", "PERMISSION_DENIED"]


def test_an_alternative_name_counts_too(tmp_path: Path) -> None:
    with guarded(server_for(tmp_path, "localhost")) as server:
        assert server.ask(caller(tmp_path, "whoever")) == "yes"


@pytest.mark.parametrize(
    ("name", "alternative"),
    [
        ("prefill\0.elsewhere", "any"),
        ("prefill\0", "any"),
        ("any", "prefill\0.elsewhere"),
        ("Prefill", "*.prefill"),
        ("*", "*"),
        ("prefill ", "prefill,any"),
    ],
)
def test_a_name_counts_as_a_whole(tmp_path: Path, name: str, alternative: str) -> None:
    """A name with a NUL, at which gRPC ends it, is none; there are no patterns, and letters have their case."""
    issued = OURS.issue(name, names=(x509.DNSName(alternative),)).write(tmp_path / "caller", OURS)
    with guarded(server_for(tmp_path, "prefill")) as server:
        assert isinstance(server.refusal(ChannelSecurity(issued)), PermissionDeniedError)


def with_names(folder: Path, *names: x509.GeneralName, called: str = "any") -> ChannelSecurity:
    return ChannelSecurity(OURS.issue(called, names=names).write(folder / "caller", OURS))


SPIFFE = "spiffe://cluster.local/ns/llm/sa/prefill"


@pytest.mark.parametrize(
    "name",
    [
        x509.UniformResourceIdentifier("prefill"),
        x509.RFC822Name("prefill"),
        x509.UniformResourceIdentifier("10.1.2.3"),
        x509.IPAddress(ip_address("10.1.2.3")),
        x509.DNSName(SPIFFE),
        x509.RFC822Name(SPIFFE),
        x509.DNSName(f"URI:{SPIFFE}"),
        x509.UniformResourceIdentifier(f"URI:{SPIFFE}"),
        x509.UniformResourceIdentifier(f"{SPIFFE}\0/x"),
    ],
)
def test_a_name_of_another_kind_does_not_count(tmp_path: Path, name: x509.GeneralName) -> None:
    with guarded(server_for(tmp_path, "prefill", "10.1.2.3", f"URI:{SPIFFE}")) as server:
        assert isinstance(server.refusal(with_names(tmp_path, name)), PermissionDeniedError)
        assert isinstance(server.refusal(with_names(tmp_path, name, called=f"URI:{SPIFFE}")), PermissionDeniedError)


def test_a_uri_counts_as_one(tmp_path: Path) -> None:
    spiffe = with_names(tmp_path, x509.UniformResourceIdentifier(SPIFFE))
    with guarded(server_for(tmp_path, f"URI:{SPIFFE}")) as server:
        assert server.ask(spiffe) == "yes"
    with guarded(server_for(tmp_path, SPIFFE)) as server:
        assert isinstance(server.refusal(spiffe), PermissionDeniedError)


def test_without_a_list_every_verified_caller_may(tmp_path: Path) -> None:
    with guarded(replace(server_for(tmp_path), client_names=frozenset())) as server:
        assert server.ask(caller(tmp_path, "stranger")) == "yes"


def test_a_stranger_may_ask_what_is_served(tmp_path: Path) -> None:
    with (
        guarded(server_for(tmp_path, "prefill")) as server,
        open_channel(server.address, caller(tmp_path, "stranger")) as channel,
    ):
        request = prefill_pb2.PrefillServiceGetServerInfoRequest()
        stub = prefill_pb2_grpc.PrefillServiceStub(channel)
        assert stub.GetServerInfo(request, timeout=WAIT_SECONDS).version == "1"
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=WAIT_SECONDS)


@contextmanager
def decode(security: ServerSecurity) -> Iterator[str]:
    """A decode service whose methods are not written."""
    server = Server(
        decode_pb2_grpc.add_DecodeServiceServicer_to_server,
        decode_pb2_grpc.DecodeServiceServicer(),
        "spectrumkv.v1.DecodeService",
        threads=2,
        count_ended=lambda code: None,
        security=security,
    )
    port = server.bind("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.drain(0, threading.Event())


@pytest.mark.parametrize(("name", "refused"), [("prefill", False), ("stranger", True)])
def test_decode_takes_kv_and_bases_from_prefill_alone(tmp_path: Path, name: str, refused: bool) -> None:
    with (
        decode(server_for(tmp_path, "prefill")) as address,
        open_channel(address, caller(tmp_path, name)) as channel,
    ):
        stub = decode_pb2_grpc.DecodeServiceStub(channel)
        with pytest.raises(grpc.RpcError) as of_decode:
            list(stub.Decode(iter([decode_pb2.DecodeRequest()]), timeout=WAIT_SECONDS))
        with pytest.raises(grpc.RpcError) as of_basis:
            stub.PutBasis(iter([decode_pb2.PutBasisRequest()]), timeout=WAIT_SECONDS)
        assert [of_decode.value.code() is REFUSED, of_basis.value.code() is REFUSED] == [refused, refused]


def test_the_log_names_the_caller(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with guarded(server_for(tmp_path, "prefill")) as server:
        server.ask(caller(tmp_path, "prefill"))
        server.refusal(caller(tmp_path, "stranger"))
    callers = [record.fields["caller"] for record in caplog.records if record.message == "request ended"]
    assert callers == ["prefill", "stranger"]


def test_the_name_of_a_token_comes_before_that_of_a_certificate(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for name, line in (("accepted", "alice:some-token-0123456789"), ("sent", "some-token-0123456789")):
        (tmp_path / name).write_text(line)
    with guarded(replace(server_for(tmp_path, "prefill", "stranger"), token_file=tmp_path / "accepted")) as server:
        server.ask(replace(caller(tmp_path, "prefill"), token_file=tmp_path / "sent"))
        server.refusal(caller(tmp_path, "stranger"))
    ends = [record.fields for record in caplog.records if record.message == "request ended"]
    assert [(one["caller"], one["certificate"]) for one in ends] == [("alice", "prefill"), ("stranger", "stranger")]
