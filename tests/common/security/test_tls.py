"""TLS and mutual TLS on a scripted server, over real sockets."""

import queue
import socket
import ssl
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509

from spectrumkv.common.errors import DeadlineExceededError, InvalidArgumentError, UnavailableError
from spectrumkv.common.rpc.channel import open_channel
from spectrumkv.common.rpc.targets import Target
from spectrumkv.common.security import ChannelSecurity, ServerSecurity, TlsFiles
from spectrumkv.v1 import prefill_pb2, prefill_pb2_grpc
from tests.common.rpc.scripted import WAIT_SECONDS, response, wait
from tests.common.security.certificates import Authority, replace
from tests.common.security.guarded import guarded, relay, start, texts

OURS, THEIRS = Authority("ours"), Authority("theirs")


def trusting(folder: Path, authority: Authority = OURS, shows: TlsFiles | None = None) -> ChannelSecurity:
    """A caller that trusts an authority, and may show a certificate."""
    folder.mkdir(exist_ok=True)
    (folder / "trusted.pem").write_bytes(authority.cert)
    cert, key = (shows.cert, shows.key) if shows else (None, None)
    return ChannelSecurity(TlsFiles(cert, key, folder / "trusted.pem"))


def serving_tls(folder: Path) -> ServerSecurity:
    return ServerSecurity(OURS.issue().write(folder))


def mutual(folder: Path) -> ServerSecurity:
    return ServerSecurity(OURS.issue().write(folder, OURS), verify_clients=True)


def test_tls_serves_whoever_trusts_its_authority(tmp_path: Path) -> None:
    with guarded(serving_tls(tmp_path / "server")) as server:
        assert server.ask(trusting(tmp_path / "client")) == "yes"
        with server.client(trusting(tmp_path / "client")) as client:
            assert client.is_serving()
            client.wait_until_serving(WAIT_SECONDS)
        assert server.codes == ["OK"]


def test_a_server_of_another_authority_is_not_talked_to(tmp_path: Path) -> None:
    with guarded(serving_tls(tmp_path / "server")) as server:
        for trust in (trusting(tmp_path / "client", THEIRS), ChannelSecurity(TlsFiles())):
            refusal = server.refusal(trust)
            assert isinstance(refusal, UnavailableError)
            assert refusal.message.startswith(
                "the server's certificate is not from an authority that is trusted here"
            )
            assert "--tls-ca" in refusal.message
        assert server.codes == []


@pytest.mark.parametrize(
    ("lasts", "names", "said"),
    [
        (timedelta(seconds=-1), None, "the server's certificate has expired"),
        (timedelta(days=1), (x509.DNSName("another.example"),), "the server's certificate is for another name"),
    ],
)
def test_a_certificate_out_of_date_or_of_another_name_is_not_trusted(
    tmp_path: Path, lasts: timedelta, names: tuple[x509.GeneralName, ...] | None, said: str
) -> None:
    issued = OURS.issue(lasts=lasts, **({} if names is None else {"names": names}))
    with guarded(ServerSecurity(issued.write(tmp_path / "server"))) as server:
        refusal = server.refusal(trusting(tmp_path / "client"))
        assert isinstance(refusal, UnavailableError)
        assert refusal.message.startswith(said)


def test_plaintext_to_a_tls_server_says_so(tmp_path: Path) -> None:
    with guarded(serving_tls(tmp_path / "server")) as server:
        refusal = server.refusal(ChannelSecurity())
        assert isinstance(refusal, UnavailableError)
        assert "it may expect TLS (give --tls-ca)" in refusal.message
        assert server.codes == []


def test_tls_to_a_plaintext_server_says_so(tmp_path: Path) -> None:
    with guarded(ServerSecurity()) as server:
        refusal = server.refusal(trusting(tmp_path / "client"))
        assert isinstance(refusal, UnavailableError)
        assert refusal.message.startswith("the server does not speak TLS")


def test_waiting_for_a_server_that_is_not_trusted_ends_with_the_reason(tmp_path: Path) -> None:
    with (
        guarded(serving_tls(tmp_path / "server")) as server,
        server.client(trusting(tmp_path / "client", THEIRS)) as client,
        pytest.raises(DeadlineExceededError, match=r"not ready after 0\.3 s .* not from an authority"),
    ):
        client.wait_until_serving(0.3)


def test_mutual_tls_serves_only_who_shows_a_certificate_of_the_authority(tmp_path: Path) -> None:
    with guarded(mutual(tmp_path / "server")) as server:
        known = OURS.issue("client").write(tmp_path / "known")
        assert server.ask(trusting(tmp_path, shows=known)) == "yes"
        strangers = {
            "nothing": None,
            "another authority's": THEIRS.issue("client").write(tmp_path / "stranger"),
            "an authority's that took our authority's name": Authority("ours")
            .issue("client")
            .write(tmp_path / "impostor"),
            "one of tomorrow": OURS.issue("client", lasts=timedelta(days=2), begins=timedelta(days=1)).write(
                tmp_path / "early"
            ),
            "an expired one": OURS.issue("client", lasts=timedelta(seconds=-1)).write(tmp_path / "expired"),
        }
        for shown in strangers.values():
            refusal = server.refusal(trusting(tmp_path, shows=shown))
            assert isinstance(refusal, UnavailableError)
            assert "a certificate that it trusts (--tls-cert and --tls-key)" in refusal.message
        # Nor do they learn the server's health.
        with server.client(trusting(tmp_path)) as client, pytest.raises(UnavailableError):
            client.is_serving()
        assert server.codes == ["OK"]


def test_a_new_certificate_of_the_server_is_shown_to_new_connections(tmp_path: Path) -> None:
    folder = tmp_path / "server"
    with guarded(serving_tls(folder)) as server:
        ours, theirs = trusting(tmp_path / "a"), trusting(tmp_path / "b", THEIRS)
        with server.channel(ours) as standing:
            assert texts(standing) == "yes"
            THEIRS.issue().write(folder)
            assert server.ask(theirs) == "yes"
            assert "not from an authority" in server.refusal(ours).message
            # A connection that stands goes on.
            assert texts(standing) == "yes"


def test_a_new_authority_of_clients_holds_for_new_connections(tmp_path: Path) -> None:
    folder = tmp_path / "server"
    with guarded(mutual(folder)) as server:
        ours = trusting(tmp_path, shows=OURS.issue("client").write(tmp_path / "ours"))
        theirs = trusting(tmp_path, shows=THEIRS.issue("client").write(tmp_path / "theirs"))
        assert server.ask(ours) == "yes"
        assert isinstance(server.refusal(theirs), UnavailableError)
        replace(folder / "ca.pem", OURS.cert + THEIRS.cert)
        assert server.ask(theirs) == "yes"
        replace(folder / "ca.pem", THEIRS.cert)
        assert isinstance(server.refusal(ours), UnavailableError)


def test_a_rotation_halfway_through_leaves_the_old_certificate_in_place(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "server"
    with guarded(serving_tls(folder)) as server:
        ours, theirs = trusting(tmp_path / "a"), trusting(tmp_path / "b", THEIRS)
        fresh = THEIRS.issue()
        replace(folder / "cert.pem", fresh.cert)
        for _ in range(2):
            assert server.ask(ours) == "yes"
        assert caplog.text.count("cannot be used; what was read before stays in use") == 1
        replace(folder / "key.pem", fresh.key)
        assert server.ask(theirs) == "yes"


def test_a_channel_follows_its_certificate_and_its_calls_go_on(tmp_path: Path) -> None:
    go, left = threading.Event(), queue.SimpleQueue[str]()

    def held(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        (name,) = context.auth_context()["x509_common_name"]
        yield response(name.decode())
        wait(go)
        yield response("end")
        left.put(context.peer())

    folder = tmp_path / "client"
    first = OURS.issue("first").write(folder)
    with (
        guarded(mutual(tmp_path / "server"), held) as server,
        server.channel(trusting(tmp_path, shows=first)) as channel,
    ):
        running = start(channel)
        assert next(running).token.text == "first"
        OURS.issue("second").write(folder)
        after = start(channel)
        assert next(after).token.text == "second"
        go.set()
        assert [one.token.text for one in running] == ["end"]
        assert [one.token.text for one in after] == ["end"]
        assert left.get(timeout=WAIT_SECONDS) != left.get(timeout=WAIT_SECONDS)
        # Both kinds of calls, and those that wait for their connection, go over the new one.
        stub = prefill_pb2_grpc.PrefillServiceStub(channel)
        info = prefill_pb2.PrefillServiceGetServerInfoRequest()
        assert stub.GetServerInfo(info, timeout=WAIT_SECONDS).version == "1"
        assert stub.GetServerInfo.future(info, timeout=WAIT_SECONDS).result().version == "1"
        assert stub.GetServerInfo.with_call(info, timeout=WAIT_SECONDS)[1].code() is grpc.StatusCode.OK
        grpc.channel_ready_future(channel).result(WAIT_SECONDS)


def test_an_outdated_connection_is_closed_once_its_last_call_is_over(tmp_path: Path) -> None:
    folder = tmp_path / "client"
    security = trusting(tmp_path, shows=OURS.issue("first").write(folder))
    with (
        guarded(mutual(tmp_path / "server")) as server,
        relay(server.address) as (address, hung_up),
        open_channel(address, security) as channel,
    ):
        for count in range(3):
            assert texts(channel) == "yes"
            assert hung_up.empty()
            OURS.issue(f"number {count}").write(folder)
            assert texts(channel) == "yes"
            hung_up.get(timeout=WAIT_SECONDS)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
def test_old_versions_of_tls_are_not_spoken(tmp_path: Path, version: ssl.TLSVersion) -> None:
    with guarded(serving_tls(tmp_path / "server")) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with pytest.warns(DeprecationWarning, match="TLSv1"):
            context.minimum_version = context.maximum_version = version
        context.set_ciphers("ALL:@SECLEVEL=0")
        host, port = server.address.split(":")
        with socket.create_connection((host, int(port)), WAIT_SECONDS) as raw, pytest.raises(ssl.SSLError):
            context.wrap_socket(raw)


def test_files_of_no_use_are_refused_at_the_start_with_the_flag_and_the_file(tmp_path: Path) -> None:
    one, other = OURS.issue().write(tmp_path / "one", OURS), OURS.issue().write(tmp_path / "other", OURS)
    assert one.cert is not None
    assert other.key is not None
    sealed = OURS.issue(password=b"secret").write(tmp_path / "sealed")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "huge").write_bytes(b"x" * (1 << 20) + b"x")
    cases = {
        f"--tls-cert {tmp_path / 'gone'} cannot be read: No such file": TlsFiles(tmp_path / "gone", one.key),
        f"--tls-cert {tmp_path} cannot be read: Is a directory": TlsFiles(tmp_path, one.key),
        f"--tls-cert {tmp_path / 'huge'} is larger than": TlsFiles(tmp_path / "huge", one.key),
        "key values mismatch": TlsFiles(one.cert, other.key),
        "the key not encrypted": sealed,
        f"--tls-ca {tmp_path / 'empty'} cannot be used": TlsFiles(ca=tmp_path / "empty"),
        f"--tls-ca {one.key} cannot be used": TlsFiles(ca=one.key),
    }
    for said, files in cases.items():
        with pytest.raises(InvalidArgumentError) as caught:
            files.watch()
        assert said in caught.value.message
    with pytest.raises(InvalidArgumentError, match="--tls-cert is given without --tls-key"):
        TlsFiles(cert=one.cert)


@pytest.mark.parametrize("address", ["10.1.2.3:50051", "prefill:50051", "[2001:db8::1]:50051"])
def test_plaintext_does_not_leave_the_machine_unless_it_is_allowed(address: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="pass --allow-plaintext"):
        ChannelSecurity().open(Target.parse(address), ())
    ChannelSecurity(allow_plaintext=True).open(Target.parse(address), ()).close()
    trusting(tmp_path).open(Target.parse(address), ()).close()
