"""Bearer tokens on a scripted server, over real sockets."""

import hmac
import logging
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st

from spectrumkv.client.cli.main import main
from spectrumkv.common.errors import InvalidArgumentError, UnauthenticatedError
from spectrumkv.common.rpc.channel import MAX_MESSAGE_BYTES, open_channel
from spectrumkv.common.rpc.status import error_from_rpc
from spectrumkv.common.security import ChannelSecurity, ServerSecurity
from spectrumkv.common.security.token_file import MAX_TOKENS, read_tokens
from spectrumkv.common.security.tokens import AcceptedTokens
from spectrumkv.v1 import prefill_pb2, prefill_pb2_grpc
from tests.common.rpc.scripted import WAIT_SECONDS
from tests.common.security.certificates import replace
from tests.common.security.guarded import Guarded, guarded, texts

TOKEN, ANOTHER, THIRD = "first-token-abcdefgh", "another-token-0123456789", "third-token-~._+/=="


@pytest.fixture(autouse=True)
def no_token_around(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPECTRUMKV_TOKEN", raising=False)


def token_file(path: Path, *tokens: str) -> Path:
    replace(path, "".join(f"{token}\n" for token in tokens).encode())
    return path


def sending(folder: Path, token: str) -> ChannelSecurity:
    return ChannelSecurity(token_file=token_file(folder / f"sent-{abs(hash(token))}", token))


def asking(folder: Path, *tokens: str) -> ServerSecurity:
    return ServerSecurity(token_file=token_file(folder / "accepted", *tokens))


def with_metadata(server: Guarded, *metadata: tuple[str, str]) -> UnauthenticatedError | None:
    """The refusal of a request that brings exactly this metadata."""
    with open_channel(server.address) as channel:
        stub = prefill_pb2_grpc.PrefillServiceStub(channel)
        try:
            list(stub.Generate(prefill_pb2.GenerateRequest(), metadata=metadata, timeout=WAIT_SECONDS))
        except grpc.RpcError as error:
            known = error_from_rpc(error)
            assert isinstance(known, UnauthenticatedError)
            return known
    return None


def test_each_accepted_token_lets_in_and_no_other(tmp_path: Path) -> None:
    with guarded(asking(tmp_path, TOKEN, "# a comment", "", f"  {ANOTHER} ", THIRD)) as server:
        for token in (TOKEN, ANOTHER, THIRD):
            assert server.ask(sending(tmp_path, token)) == "yes"
        assert server.codes == ["OK"] * 3
        refusal = server.refusal(ChannelSecurity())
        assert isinstance(refusal, UnauthenticatedError)
        assert "name its file with --token-file, or set SPECTRUMKV_TOKEN" in refusal.message
        for wrong in (TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "a-comment-that-is-no-token"):
            refusal = server.refusal(sending(tmp_path, wrong))
            assert isinstance(refusal, UnauthenticatedError)
            assert "does not accept the bearer token" in refusal.message
            assert wrong not in refusal.message
        assert server.codes[3:] == ["UNAUTHENTICATED"] * 5


def test_the_header_is_read_as_http_has_it(tmp_path: Path) -> None:
    with guarded(asking(tmp_path, TOKEN)) as server:
        for scheme in ("Bearer ", "bearer ", "BEARER   "):
            assert with_metadata(server, ("authorization", scheme + TOKEN)) is None
        right = ("authorization", f"Bearer {TOKEN}")
        refused: list[tuple[tuple[str, str], ...]] = [
            (),
            (("authorization", ""),),
            (("authorization", TOKEN),),
            (("authorization", f"Basic {TOKEN}"),),
            (("authorization", "Bearer"),),
            (("authorization", "Bearer "),),
            (("authorization", f"Bearer {TOKEN} {TOKEN}"),),
            (("x-authorization", f"Bearer {TOKEN}"),),
            # Which of two would a proxy in front have checked?
            (right, ("authorization", "Bearer of-somebody-else-0000")),
            (("authorization", "Bearer of-somebody-else-0000"), right),
        ]
        for metadata in refused:
            assert with_metadata(server, *metadata) is not None


def test_everything_but_health_wants_a_token(tmp_path: Path) -> None:
    with guarded(asking(tmp_path, TOKEN), reflection=True) as server, open_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        assert health.Check(health_pb2.HealthCheckRequest(), timeout=WAIT_SECONDS).status == 1
        info = prefill_pb2.PrefillServiceGetServerInfoRequest()
        listing = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        calls: list[Any] = [
            lambda: prefill_pb2_grpc.PrefillServiceStub(channel).GetServerInfo(info, timeout=WAIT_SECONDS),
            lambda: next(
                reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(listing, timeout=WAIT_SECONDS)
            ),
            lambda: channel.unary_unary("/spectrumkv.v1.PrefillService/Unknown")(b"", timeout=WAIT_SECONDS),
        ]
        for call in calls:
            with pytest.raises(grpc.RpcError) as caught:
                call()
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        with server.client(sending(tmp_path, TOKEN)) as client:
            assert client.server_info().version == "1"


def test_what_a_stranger_sends_is_not_even_read(tmp_path: Path) -> None:
    with guarded(asking(tmp_path, TOKEN)) as server, open_channel(server.address) as channel:
        # No message at all, one that is too long, and bytes that are no protobuf.
        generate = channel.stream_stream("/spectrumkv.v1.PrefillService/Generate")
        for sent in ([], [b"x" * (MAX_MESSAGE_BYTES - 64)], [b"\xff" * 64]):
            with pytest.raises(grpc.RpcError) as caught:
                list(generate(iter(sent), timeout=WAIT_SECONDS))
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_tokens_change_while_the_server_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    path = tmp_path / "accepted"
    sent = token_file(tmp_path / "sent", TOKEN)
    with (
        guarded(ServerSecurity(token_file=token_file(path, TOKEN))) as server,
        server.channel(ChannelSecurity(token_file=sent)) as channel,
    ):
        assert texts(channel) == "yes"
        token_file(path, ANOTHER, TOKEN)
        assert server.ask(sending(tmp_path, ANOTHER)) == "yes"
        assert texts(channel) == "yes"
        token_file(path, ANOTHER)
        with pytest.raises(grpc.RpcError) as caught:
            texts(channel)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        # The caller's file is followed too, on the channel that it has.
        token_file(sent, ANOTHER, TOKEN)
        assert texts(channel) == "yes"
        # A file of no use does not lock everybody out, and is reported once.
        path.unlink()
        assert texts(channel) == "yes"
        assert texts(channel) == "yes"
        assert caplog.text.count("cannot be used; what was read before stays in use") == 1
        token_file(path, THIRD)
        with pytest.raises(grpc.RpcError):
            texts(channel)
    for token in (TOKEN, ANOTHER, THIRD):
        assert token not in caplog.text


def test_the_environment_gives_the_token_where_no_file_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with guarded(asking(tmp_path, TOKEN)) as server:
        monkeypatch.setenv("SPECTRUMKV_TOKEN", TOKEN)
        assert server.ask(ChannelSecurity()) == "yes"
        monkeypatch.setenv("SPECTRUMKV_TOKEN", ANOTHER)
        assert isinstance(server.refusal(ChannelSecurity()), UnauthenticatedError)
        assert server.ask(sending(tmp_path, TOKEN)) == "yes"
        monkeypatch.setenv("SPECTRUMKV_TOKEN", "short secret")
        said = "SPECTRUMKV_TOKEN is not a token; allowed: 16 to 512"
        with pytest.raises(InvalidArgumentError, match=said) as caught:
            server.ask(ChannelSecurity())
        assert "short secret" not in caught.value.message


def test_the_command_sends_a_token_and_shows_a_refusal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with guarded(asking(tmp_path, TOKEN)) as server:
        command = ["info", "--server", server.address, "--json", "-"]
        assert main([*command, "--token-file", str(token_file(tmp_path / "sent", TOKEN))]) == 0
        monkeypatch.setenv("SPECTRUMKV_TOKEN", TOKEN)
        assert main(command) == 0
        monkeypatch.setenv("SPECTRUMKV_TOKEN", ANOTHER)
        capsys.readouterr()
        assert main(command) == 1
        assert capsys.readouterr().err.startswith("UNAUTHENTICATED: this server does not accept the bearer token")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "has 0 tokens; allowed: 1 to 1024, one a line"),
        (b"# only\n\n", "has 0 tokens"),
        (b"good-token-0123456789\nshort\n", "line 2 is not a token; allowed: 16 to 512 characters"),
        (b"two tokens-in-one-line-0123456789\n", "line 1 is not a token"),
        ("größer-als-ascii-0123456789\n".encode(), "line 1 is not a token"),
        (b"\xff\xfe binary nonsense 0123456789\n", "line 1 is not a token"),
        (b"x" * 513, "line 1 is not a token"),
        (b"alice:short\n", "line 1 is not a token"),
        (b":good-token-0123456789\n", "line 1 has a name that is not allowed; allowed: 1 to 32 characters"),
        (b"al ice:good-token-0123456789\n", "line 1 has a name that is not allowed"),
        (b"# first\nanonymous:good-token-0123456789\n", "line 2 has a name that is not allowed"),
        (b"good-token-0123456789-0123456789x:to-be-kept-secret\n", "line 1 has a name that is not allowed"),
        (b"bob:good-token-0123456789\n\nbob:good-token-9876543210\n", "line 3 has the name of line 1"),
        (b"line-2:good-token-0123456789\ngood-token-9876543210\n", "line 2 has the name of line 1"),
        (b"bob:good-token-0123456789\namy:good-token-0123456789\n", "line 2 has the token of line 1"),
        (b"good-token-0123456789\n" * (MAX_TOKENS + 1), "has 1025 tokens"),
    ],
)
def test_a_file_of_no_use_is_refused_at_the_start_without_showing_it(
    content: bytes, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "tokens"
    path.write_bytes(content)
    with pytest.raises(InvalidArgumentError) as caught:
        ServerSecurity(token_file=path).interceptors()
    assert caught.value.message.startswith(f"--token-file {path}")
    assert said in caught.value.message
    for word in ("good-token", "two tokens", "short\n", "nonsense", "to-be-kept-secret"):
        assert word not in caught.value.message


def test_a_token_is_compared_with_all_accepted_ones_in_constant_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[int, int]] = []
    real = hmac.compare_digest

    def counting(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return real(one, other)

    tokens = AcceptedTokens(token_file(tmp_path / "tokens", TOKEN, ANOTHER, THIRD))
    monkeypatch.setattr(hmac, "compare_digest", counting)
    for presented, name in ((TOKEN, "line-1"), (THIRD, "line-3"), ("", None), (TOKEN * 100, None)):
        compared.clear()
        assert tokens.name_of(presented) == name
        assert compared == [(32, 32)] * 3


@pytest.fixture(scope="module")
def accepted(tmp_path_factory: pytest.TempPathFactory) -> AcceptedTokens:
    return AcceptedTokens(token_file(tmp_path_factory.mktemp("tokens") / "tokens", TOKEN, THIRD))


@given(presented=st.text(max_size=80) | st.sampled_from([TOKEN, ANOTHER]))
def test_accepted_is_what_the_file_lists(accepted: AcceptedTokens, presented: str) -> None:
    assert accepted.name_of(presented) == {TOKEN: "line-1", THIRD: "line-2"}.get(presented)


def test_the_log_names_whoever_sent_a_token(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    lines = (f"alice:{TOKEN}", "# without a name", ANOTHER)
    with guarded(asking(tmp_path, *lines)) as server:
        for security in (sending(tmp_path, f"whatever:{TOKEN}"), sending(tmp_path, ANOTHER)):
            assert server.ask(security) == "yes"
        server.refusal(sending(tmp_path, THIRD))
        server.refusal(ChannelSecurity())
        token_file(tmp_path / "accepted", f"bob:{ANOTHER}")
        assert server.ask(sending(tmp_path, ANOTHER)) == "yes"
    ends = [record.fields for record in caplog.records if record.message == "request ended"]
    assert [(one["caller"], one["code"]) for one in ends] == [
        ("alice", "OK"), ("line-3", "OK"), ("anonymous", "UNAUTHENTICATED"), ("anonymous", "UNAUTHENTICATED"),
        ("bob", "OK"),
    ]  # fmt: skip
    assert all(one["peer"].startswith("ipv4:127.0.0.1:") for one in ends)
    for token in (TOKEN, ANOTHER, THIRD):
        assert token not in str(ends)


def test_a_token_does_not_show_where_it_is_printed(tmp_path: Path) -> None:
    read = read_tokens("--token-file", token_file(tmp_path / "tokens", f"alice:{TOKEN}"))
    assert "alice" in repr(read)
    assert TOKEN not in repr(read)
