"""Heads that h11 lets through and the gateway does not, and what browsers send for pages of other origins."""

import json
from contextlib import closing

import pytest

from tests.client.fake_servers import FakePrefill
from tests.gateway.http.test_hostile import HEAD, read_answer
from tests.gateway.running import RunningGateway, running_gateway

BODY = b'{"prompt": "x", "model": "m"}'
FOREIGN = "http://elsewhere.example"


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * (64 << 10),
        b"GET /health HTTP/1.1\r\nHost: x" + b"\r\nX-Many: a" * 10_000,
        b"GET /" + b"a" * (64 << 10) + b" HTTP/1.1\r\nHost: x",
        b"GET /health?" + b"a" * (64 << 10) + b" HTTP/1.1\r\nHost: x",
    ],
    ids=["long", "many", "path", "query"],
)
def test_a_long_head_is_refused_though_it_comes_at_once(gateway: RunningGateway, head: bytes) -> None:
    with closing(gateway.socket()) as sock:
        sock.sendall(head + b"\r\n\r\n")
        answer = read_answer(sock)
    assert answer.status == 431
    assert "the headers are longer than 16384 bytes" in answer.error["message"]


def test_a_body_of_two_lengths_is_refused(gateway: RunningGateway, prefill: FakePrefill) -> None:
    chunk = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
    with closing(gateway.socket()) as sock:
        sock.sendall(HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk)
        answer = read_answer(sock)
    assert (answer.status, answer.error["message"][:30]) == (400, "the request has both Content-L")
    assert not prefill.requests


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "identity, gzip"])
def test_a_packed_body_is_refused_by_name(gateway: RunningGateway, encoding: str) -> None:
    answer = gateway.ask("POST", "/v1/completions", BODY, {"content-encoding": encoding})
    assert (answer.status, answer.error["message"][:21]) == (415, "Content-Encoding is '")
    assert gateway.ask("POST", "/v1/completions", BODY, {"content-encoding": "identity"}).status == 200


@pytest.mark.parametrize(
    "sent",
    [
        {"origin": FOREIGN},
        {"origin": "null"},
        {"origin": "http://["},
        {"origin": FOREIGN, "sec-fetch-site": "cross-site"},
        {"origin": FOREIGN, "sec-fetch-site": "same-site"},
    ],
    ids=lambda sent: "+".join(sent.values()),
)
@pytest.mark.parametrize("kind", ["text/plain", "application/json"])
def test_a_page_of_another_origin_has_nothing_done(
    gateway: RunningGateway, prefill: FakePrefill, sent: dict[str, str], kind: str
) -> None:
    """A browser sends texts without asking first, and cannot show the answer; the work would be done all the same."""
    answer = gateway.ask("POST", "/v1/completions", BODY, {"content-type": kind, **sent})
    assert answer.status == 403
    assert "name its origin in --cors-origins" in answer.error["message"]
    assert not prefill.requests


def test_pages_that_may_call(prefill: FakePrefill) -> None:
    with running_gateway(prefill.address, cors_origins=FOREIGN) as gateway:
        for sent in (
            {"origin": FOREIGN, "sec-fetch-site": "cross-site"},
            {"origin": f"http://127.0.0.1:{gateway.port}"},
            # Behind a proxy that puts its own name for the gateway into Host.
            {"origin": "https://gateway.example", "sec-fetch-site": "same-origin"},
        ):
            assert gateway.ask("POST", "/v1/completions", BODY, sent).status == 200


@pytest.mark.parametrize("path", ["/health/", "/v1/completions/", "//health", "/page/../health"])
def test_no_path_leads_to_another(gateway: RunningGateway, path: str) -> None:
    """A redirection would have to name a server, and Host may be anybody's."""
    answer = gateway.ask("GET", path, headers={"host": "elsewhere.example"})
    assert answer.status == 404
    assert "location" not in answer.headers


@pytest.mark.parametrize(
    "sent", [b"G" * 8000 + b" / HTTP/1.1\r\nHost: x\r\n\r\n", b"GET " + b"\xff" * 8000 + b"\r\n\r\n"]
)
def test_a_long_method_or_line_is_not_sent_back_whole(gateway: RunningGateway, sent: bytes) -> None:
    with closing(gateway.socket()) as sock:
        sock.sendall(sent)
        received = sock.recv(65536)
        head, _, body = received.partition(b"\r\n\r\n")
        while len(body) < int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0]):
            body += sock.recv(65536)
    assert len(json.loads(body)["error"]["message"]) < 400
