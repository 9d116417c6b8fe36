"""HTTPS: handshakes that never end are bounded, and certificates change without a restart."""

import ssl
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import pytest

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.service import machine
from spectrumkv.gateway.http import tls
from tests.client.fake_servers import FakePrefill
from tests.common.security.certificates import Authority, replace
from tests.gateway.running import WAIT_SECONDS, RunningGateway, running_gateway
from tests.waiting import until

OURS, THEIRS = Authority("ours"), Authority("theirs")
REQUEST = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


@pytest.fixture
def secured(prefill: FakePrefill, tmp_path: Path) -> Iterator[RunningGateway]:
    files = OURS.issue().write(tmp_path, OURS)
    with running_gateway(prefill.address, tls_cert=str(files.cert), tls_key=str(files.key)) as gateway:
        yield gateway


def ask(gateway: RunningGateway, authority: Authority) -> bytes:
    """Return the first bytes of an answer from a server that an authority vouches for."""
    context = ssl.create_default_context(cadata=authority.cert.decode())
    with context.wrap_socket(gateway.socket(), server_hostname="127.0.0.1") as sock:
        sock.sendall(REQUEST)
        return sock.recv(15)


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01\x02\x00\x01"], ids=["silent", "halfway"])
def test_handshakes_that_never_end_make_room(
    secured: RunningGateway, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(machine, "MAX_CONNECTIONS", 16)
    with ExitStack() as opened:
        silent = [opened.enter_context(closing(secured.socket())) for _ in range(64)]
        for one in silent:
            one.sendall(sent)
        assert ask(secured, OURS) == b"HTTP/1.1 200 OK"
        assert (secured.metrics.registry.get_sample_value("spectrumkv_gateway_connections") or 0) <= 16
        # Closed while it waited for its handshake, which may look like a reset.
        silent[0].settimeout(WAIT_SECONDS)
        with suppress(ConnectionResetError):
            assert silent[0].recv(1) == b""


def test_a_handshake_has_its_time(prefill: FakePrefill, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "HANDSHAKE_SECONDS", 0.3)
    files = OURS.issue().write(tmp_path, OURS)
    with (
        running_gateway(prefill.address, tls_cert=str(files.cert), tls_key=str(files.key)) as gateway,
        closing(gateway.socket()),
    ):
        until(lambda: gateway.metrics.registry.get_sample_value("spectrumkv_gateway_connections") == 1)
        until(lambda: gateway.metrics.registry.get_sample_value("spectrumkv_gateway_connections") == 0)


def test_plaintext_to_https_disturbs_nobody(secured: RunningGateway) -> None:
    with closing(secured.socket()) as sock:
        sock.sendall(REQUEST)
        assert not sock.recv(4096).startswith(b"HTTP")
    assert ask(secured, OURS) == b"HTTP/1.1 200 OK"


def test_a_new_certificate_is_shown_to_new_connections_and_a_damaged_one_to_none(
    secured: RunningGateway, tmp_path: Path
) -> None:
    assert ask(secured, OURS) == b"HTTP/1.1 200 OK"
    THEIRS.issue().write(tmp_path)
    assert ask(secured, THEIRS) == b"HTTP/1.1 200 OK"
    with pytest.raises(ssl.SSLCertVerificationError):
        ask(secured, OURS)
    replace(tmp_path / "cert.pem", b"damaged")
    assert ask(secured, THEIRS) == b"HTTP/1.1 200 OK"


@pytest.mark.parametrize("damaged", ["cert", "key"])
def test_files_of_no_use_are_refused_in_a_sentence(prefill: FakePrefill, tmp_path: Path, damaged: str) -> None:
    files = OURS.issue().write(tmp_path, OURS)
    replace(tmp_path / f"{damaged}.pem", b"damaged")
    with (
        pytest.raises(InvalidArgumentError, match=r"--tls-cert .* and --tls-key .* cannot be used"),
        running_gateway(prefill.address, tls_cert=str(files.cert), tls_key=str(files.key)),
    ):
        pass


def test_a_request_that_comes_with_the_end_of_its_handshake_is_read(secured: RunningGateway) -> None:
    """The client's last message of the handshake and its request are sent as one piece."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.create_default_context(cadata=OURS.cert.decode())
    client = context.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
    with closing(secured.socket()) as sock:
        while True:
            try:
                client.do_handshake()
                break
            except ssl.SSLWantReadError:
                sock.sendall(outgoing.read())
                incoming.write(sock.recv(65536))
        client.write(REQUEST)
        sock.sendall(outgoing.read())
        answer = b""
        while not answer:
            incoming.write(sock.recv(65536))
            try:
                answer = client.read(15)
            except ssl.SSLWantReadError:
                continue
    assert answer == b"HTTP/1.1 200 OK"


def failed(gateway: RunningGateway, files: str) -> float | None:
    return gateway.metrics.registry.get_sample_value("spectrumkv_file_reload_failed", {"files": files})


def test_each_scrape_looks_at_the_files(prefill: FakePrefill, tmp_path: Path) -> None:
    for side in ("served", "shown"):
        (tmp_path / side).mkdir()
    served, shown = OURS.issue().write(tmp_path / "served"), THEIRS.issue().write(tmp_path / "shown", THEIRS)
    accepted, sent = tmp_path / "accepted", tmp_path / "sent"
    for path in (accepted, sent):
        path.write_text("a-token-of-the-tests-0001\n")
    options = {"tls_cert": served.cert, "tls_key": served.key, "token_file": accepted, "prefill_token_file": sent}
    options |= {"prefill_tls_cert": shown.cert, "prefill_tls_key": shown.key, "prefill_tls_ca": shown.ca}
    with running_gateway(prefill.address, **{name: str(path) for name, path in options.items()}) as gateway:
        # It has begun: nothing else reads the files for the first time.
        ask(gateway, OURS)
        kinds = ("tls", "prefill_tls", "token_file", "prefill_token_file")
        assert [failed(gateway, files) for files in kinds] == [0, 0, 0, 0]
        for path in (tmp_path / "served" / "key.pem", tmp_path / "shown" / "ca.pem", accepted, sent):
            replace(path, b"damaged")
        assert [failed(gateway, files) for files in kinds] == [1, 1, 1, 1]
        for file in ("tls_cert", "prefill_tls_cert", "prefill_tls_ca"):
            name = "spectrumkv_certificate_expiry_timestamp_seconds"
            assert (gateway.metrics.registry.get_sample_value(name, {"file": file}) or 0) > time.time()


def test_files_for_prefill_are_refused_by_their_own_options(prefill: FakePrefill, tmp_path: Path) -> None:
    files = THEIRS.issue().write(tmp_path, THEIRS)
    given = {f"prefill_tls_{kind}": str(getattr(files, kind)) for kind in ("cert", "key", "ca")}
    for damaged, said in (
        ("key.pem", r"--prefill-tls-cert .* and --prefill-tls-key .* cannot be used"),
        ("ca.pem", r"--prefill-tls-ca .* cannot be used"),
    ):
        kept = (tmp_path / damaged).read_bytes()
        replace(tmp_path / damaged, b"damaged")
        with pytest.raises(InvalidArgumentError, match=said), running_gateway(prefill.address, **given):
            pass
        replace(tmp_path / damaged, kept)
