"""Both services as processes under mutual TLS and bearer tokens, and what their logs and metrics say."""

import json
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from spectrumkv.client.cli.main import main
from spectrumkv.client.client import SpectrumClient
from spectrumkv.client.local.running_pair import RunningPair, running_pair
from spectrumkv.client.request import Sampling
from spectrumkv.common.errors import InvalidArgumentError, UnauthenticatedError, UnavailableError
from spectrumkv.common.security import ChannelSecurity, TlsFiles
from spectrumkv.common.telemetry.tracing import TraceContext
from tests.common.security.certificates import Authority, replace
from tests.processes.conftest import options
from tests.tiny_models import build_tiny_model

FIRST, SECOND = "secret-token-one-4f1d8a", "secret-token-two-9b27c3"
PROMPT = "Never log the xylophone of the lighthouse keeper"
TRACE = TraceContext("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "vendor=opaque")
EIGHT = Sampling(max_tokens=8, ignore_eos=True)


class Log:
    """What both processes write, which arrives from threads."""

    def __init__(self) -> None:
        self._lines: list[tuple[str, str]] = []
        self._changed = threading.Condition()

    def add(self, name: str, line: str) -> None:
        with self._changed:
            self._lines.append((name, line))
            self._changed.notify_all()

    @property
    def text(self) -> str:
        with self._changed:
            return "\n".join(line for _, line in self._lines)

    def ends(self, request_id: str, *services: str) -> dict[str, dict[str, Any]]:
        """The lines of a request's end by service, once these services have written theirs."""
        found: dict[str, dict[str, Any]] = {}

        def all_there() -> bool:
            lines = [(name, json.loads(line)) for name, line in self._lines if line.startswith("{")]
            found.update({name: line for name, line in lines if line.get("request_id") == request_id})
            return found.keys() >= set(services)

        with self._changed:
            assert self._changed.wait_for(all_there, 20), f"{request_id} is logged by {set(found)} only"
        return found


@dataclass
class Deployment:
    pair: RunningPair
    folder: Path
    log: Log
    secrets: list[str]

    def known(self) -> ChannelSecurity:
        """A caller with everything."""
        return self.pair.security


def rotate(folder: Path, authority: Authority) -> str:
    """New certificate, key and authority for both services and for callers; returns the secret part."""
    issued = authority.issue()
    issued.write(folder, authority)
    return issued.key.decode().splitlines()[1]


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("secured")
    secrets = [FIRST, SECOND, rotate(folder, Authority("first"))]
    (folder / "tokens").write_text(f"some-operator:{FIRST}\n")
    model = build_tiny_model("llama", folder / "llama")
    guarded = {
        "tls_cert": str(folder / "cert.pem"),
        "tls_key": str(folder / "key.pem"),
        "tls_ca": str(folder / "ca.pem"),
        "token_file": str(folder / "tokens"),
        "log_format": "json",
        "log_level": "debug",
    }
    log = Log()
    with running_pair(options(model, **guarded), log.add, 120) as pair:
        yield Deployment(pair, folder, log, secrets)


def generate(deployment: Deployment, security: ChannelSecurity, request_id: str, port: str = "prefill") -> int:
    address = {"prefill": deployment.pair.prefill, "decode": deployment.pair.decode}[port].address
    with SpectrumClient(str(address), security) as client:
        stream = client.generate(PROMPT, sampling=EIGHT, request_id=request_id, trace=TRACE, timeout=60)
        return len(stream.result().tokens)


def test_a_request_passes_from_client_to_prefill_to_decode(deployment: Deployment) -> None:
    assert generate(deployment, deployment.known(), "passes") == 8


def test_both_services_refuse_who_shows_no_certificate_or_no_token(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SPECTRUMKV_TOKEN", raising=False)
    known = deployment.known()
    assert known.tls is not None
    wrong_token = deployment.folder / "wrong"
    wrong_token.write_text("secret-but-not-accepted\n")
    for launch in (deployment.pair.prefill, deployment.pair.decode):
        for security, error in (
            (ChannelSecurity(known.tls), UnauthenticatedError),
            (ChannelSecurity(known.tls, wrong_token), UnauthenticatedError),
            (ChannelSecurity(TlsFiles(ca=known.tls.ca), known.token_file), UnavailableError),
            (ChannelSecurity(None, known.token_file), UnavailableError),
        ):
            with SpectrumClient(str(launch.address), security) as client, pytest.raises(error):
                client.server_info(timeout=10)


def test_one_line_for_each_request_on_both_sides_with_the_same_id(deployment: Deployment) -> None:
    generate(deployment, deployment.known(), "same-on-both")
    ends = deployment.log.ends("same-on-both", "prefill", "decode")
    prefill, decode = ends["prefill"], ends["decode"]
    assert prefill["service"] == "PrefillService"
    assert decode["service"] == "DecodeService"
    for line in ends.values():
        assert line["message"] == "request ended"
        assert line["code"] == "OK"
        assert line["trace_id"] == TRACE.trace_id
        assert line["level"] == "info"
        assert line["seconds"] > 0
        assert line["caller"] == "some-operator"
    assert prefill["prompt_tokens"] == decode["prompt_tokens"] > 0
    assert prefill["kv_bytes"] == decode["kv_bytes"] > 0
    assert prefill["completion_tokens"] == 8
    # The first of them is prefill's own.
    assert decode["completion_tokens"] == 7
    assert prefill["decode_worker"] == str(deployment.pair.decode.address)
    durations = {"queue", "prefill", "encode", "transfer", "ttft", "handoff"}
    assert all(prefill[f"{name}_seconds"] >= 0 for name in durations)
    assert decode["receive_seconds"] > 0
    assert decode["decode_seconds"] > 0


def test_a_refused_request_is_logged_with_its_code_and_nothing_that_it_said(deployment: Deployment) -> None:
    stop = Sampling(max_tokens=8, stop=("xylophone" * 40,))
    with SpectrumClient(deployment.pair.address, deployment.known()) as client, pytest.raises(InvalidArgumentError):
        client.generate(PROMPT, sampling=stop, request_id="refused", timeout=60).result()
    ends = deployment.log.ends("refused", "prefill")
    assert ends["prefill"]["code"] == "INVALID_ARGUMENT"
    assert "error" not in ends["prefill"]


@pytest.mark.parametrize("bad", ["x" * 129, "two\nlines", "bell\x07", "line\u2028separator"])
def test_an_id_that_no_log_should_hold_is_refused(deployment: Deployment, bad: str) -> None:
    with pytest.raises(InvalidArgumentError, match="request_id"):
        generate(deployment, deployment.known(), bad)


def test_the_command_takes_the_flags(
    deployment: Deployment, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACEPARENT", TRACE.traceparent)
    monkeypatch.setenv("SPECTRUMKV_TOKEN", FIRST)
    files = {"--tls-ca": "ca.pem", "--tls-cert": "cert.pem", "--tls-key": "key.pem"}
    flags = [word for flag, name in files.items() for word in (flag, str(deployment.folder / name))]
    command = ["generate", PROMPT, "--max-tokens", "3", "--server", deployment.pair.address]
    assert main([*command, *flags]) == 0
    capsys.readouterr()
    assert main(command) == 1
    assert "it may expect TLS (give --tls-ca)" in capsys.readouterr().err
    assert main([*command, *flags[2:]]) == 1
    assert "need TLS; name the authority with --tls-ca" in capsys.readouterr().err
    monkeypatch.setenv("TRACEPARENT", "no trace")
    assert main([*command, *flags]) == 1
    assert "traceparent is 'no trace'" in capsys.readouterr().err


def test_tokens_and_certificates_change_without_a_restart(deployment: Deployment) -> None:
    tokens = deployment.folder / "tokens"
    replace(tokens, f"{SECOND}\n".encode())
    assert generate(deployment, deployment.known(), "new-token") == 8
    old_token = deployment.folder / "old"
    old_token.write_text(f"{FIRST}\n")
    with pytest.raises(UnauthenticatedError):
        generate(deployment, ChannelSecurity(deployment.known().tls, old_token), "old-token")
    old_authority = deployment.folder / "old-ca.pem"
    old_authority.write_bytes((deployment.folder / "ca.pem").read_bytes())
    # Another authority altogether: prefill's connection to decode has to follow it as well.
    deployment.secrets.append(rotate(deployment.folder, Authority("second")))
    assert generate(deployment, deployment.known(), "new-certificates") == 8
    with pytest.raises(UnavailableError, match="not from an authority that is trusted here"):
        generate(deployment, ChannelSecurity(TlsFiles(ca=old_authority), tokens), "old-authority")
    deployment.log.ends("new-certificates", "prefill", "decode")
    assert "cannot be used" not in deployment.log.text


def test_no_secret_and_no_prompt_in_logs_or_metrics(deployment: Deployment) -> None:
    generate(deployment, deployment.known(), "the-last")
    deployment.log.ends("the-last", "prefill", "decode")
    texts = [deployment.log.text]
    for launch in (deployment.pair.prefill, deployment.pair.decode):
        with urllib.request.urlopen(f"http://{launch.metrics_address}/metrics", timeout=10) as answer:
            texts.append(answer.read().decode())
    assert "request ended" in texts[0]
    assert "spectrumkv_requests_total" in texts[1]
    assert all("operator" not in metrics for metrics in texts[1:])
    for text in texts:
        for secret in (*deployment.secrets, "secret-but-not-accepted", "PRIVATE KEY", "Bearer"):
            assert secret not in text
        assert "xylophone" not in text


def test_metrics_are_not_served_where_requests_are(deployment: Deployment) -> None:
    for launch in (deployment.pair.prefill, deployment.pair.decode):
        assert launch.metrics_address != launch.address
        with pytest.raises(OSError):  # noqa: PT011  # whatever HTTP makes of a TLS server that is no HTTP server
            urllib.request.urlopen(f"http://{launch.address}/metrics", timeout=10)
