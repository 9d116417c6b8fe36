"""Options of TLS, plaintext and clients' names: which go together, and which are refused."""

import pytest

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.security import ServerSecurity
from spectrumkv.common.service.config import (
    Address,
    DecodeConfig,
    PrefillConfig,
    build,
    flag_name,
)
from tests.common.service.test_config import CONFIGS, refusal


@pytest.mark.parametrize("name", ["listen", "metrics_listen"])
@pytest.mark.parametrize(
    "host", ["0.0.0.0", "[::]", "10.1.2.3", "192.168.0.1", "decode", "127.0.0.1.example.com", "localhost.example.com"]
)
@pytest.mark.parametrize("config", CONFIGS)
def test_plaintext_to_other_machines_must_be_allowed(config, host, name):
    message = refusal(config, {name: f"{host}:50051"})
    assert message.startswith(f"{flag_name(name)} is {host}:50051, which other machines can reach")
    assert "--allow-plaintext" in message
    allowed = build(config, {name: f"{host}:50051", "allow_plaintext": True})
    assert getattr(allowed, name) == Address(host, 50051)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "localhost", "[::1]", "[0:0:0:0:0:0:0:1]"])
def test_plaintext_within_the_machine_is_fine(host):
    assert build(DecodeConfig, {"listen": f"{host}:0"}).listen.is_loopback


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("given", "missing"), [("tls_cert", "tls_key"), ("tls_key", "tls_cert")])
def test_a_certificate_and_its_key_go_together(config, given, missing):
    message = refusal(config, {given: "a.pem"})
    assert message.startswith(f"{flag_name(given)} is given without {flag_name(missing)}")


@pytest.mark.parametrize("config", CONFIGS)
def test_tls_may_be_served_to_other_machines_and_metrics_stay_here(config):
    tls = {"tls_cert": "a.pem", "tls_key": "b.pem"}
    assert build(config, {"listen": "0.0.0.0:50051", **tls}).listen == Address("0.0.0.0", 50051)
    assert refusal(config, {"metrics_listen": "0.0.0.0:9464", **tls}).startswith("--metrics-listen is 0.0.0.0:9464")


def test_plaintext_to_decode_workers_elsewhere_must_be_allowed():
    message = refusal(PrefillConfig, {"decode": "127.0.0.1:1,decode:50052"})
    assert message.startswith("--decode is decode:50052, which other machines can reach")
    assert "--tls-ca" in message
    for more in ({"tls_ca": "ca.pem"}, {"allow_plaintext": True}):
        assert build(PrefillConfig, {"decode": "decode:50052", **more}).decode == (Address("decode", 50052),)


def test_clients_cannot_be_verified_without_tls():
    assert "without --tls-cert there is no TLS" in refusal(DecodeConfig, {"tls_ca": "ca.pem"})


def test_plaintext_of_metrics_is_allowed_apart_from_that_of_requests() -> None:
    for config in (PrefillConfig, DecodeConfig):
        build(config, {"metrics_listen": "0.0.0.0:9464", "allow_plaintext_metrics": True})
        with pytest.raises(InvalidArgumentError, match=r"--listen is 0\.0\.0\.0:50051"):
            build(config, {"listen": "0.0.0.0:50051", "allow_plaintext_metrics": True})
    with pytest.raises(InvalidArgumentError, match=r"--decode is 203\.0\.113\.1:50052"):
        build(PrefillConfig, {"decode": "203.0.113.1:50052", "allow_plaintext_metrics": True})


def test_names_of_clients_need_certificates_to_be_in() -> None:
    files = {"tls_cert": "cert.pem", "tls_key": "key.pem"}
    names = {"tls_client_names": "prefill-1, prefill-2"}
    config = build(DecodeConfig, {**files, "tls_ca": "ca.pem", **names})
    assert ServerSecurity.from_config(config).client_names == {"prefill-1", "prefill-2"}
    for more in ({}, files, {**files, "tls_ca": "ca.pem", "tls_clients": "any"}):
        with pytest.raises(InvalidArgumentError, match="--tls-client-names asks for"):
            build(DecodeConfig, {**more, **names})
    for empty in (",", "prefill,", " "):
        with pytest.raises(InvalidArgumentError, match="allowed: names, separated by commas"):
            build(DecodeConfig, {**files, "tls_ca": "ca.pem", "tls_client_names": empty})
