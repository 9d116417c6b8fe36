"""What the metrics say of files of certificates and tokens while they are replaced."""

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from spectrumkv.common.security.file_metrics import first_expiry, show_files
from spectrumkv.common.service.config import DecodeConfig, PrefillConfig, build
from spectrumkv.common.telemetry.metrics import Metrics
from tests.common.security.certificates import Authority, replace

DAY_SECONDS = 86400.0
TOKEN = "a-token-of-the-tests-0001\n"


def shown(config: Any) -> Metrics:
    metrics = Metrics(CollectorRegistry())
    show_files(config, metrics.files)
    return metrics


def days_left(metrics: Metrics, file: str) -> float | None:
    name = "spectrumkv_certificate_expiry_timestamp_seconds"
    expiry = metrics.registry.get_sample_value(name, {"file": file})
    return None if expiry is None else (expiry - time.time()) / DAY_SECONDS


def failed(metrics: Metrics, files: str) -> float | None:
    return metrics.registry.get_sample_value("spectrumkv_file_reload_failed", {"files": files})


def test_the_expiry_follows_certificates_that_are_renewed(tmp_path: Path) -> None:
    authority = Authority("metrics")
    files = authority.issue(lasts=timedelta(days=3)).write(tmp_path, authority)
    options = {"tls_cert": str(files.cert), "tls_key": str(files.key), "tls_ca": str(files.ca)}
    metrics = shown(build(DecodeConfig, options))
    assert days_left(metrics, "tls_cert") == pytest.approx(3, abs=0.01)
    assert days_left(metrics, "tls_ca") == pytest.approx(1, abs=0.01)
    authority.issue(lasts=timedelta(days=9)).write(tmp_path)
    assert days_left(metrics, "tls_cert") == pytest.approx(9, abs=0.01)
    assert failed(metrics, "tls") == 0


def test_a_key_of_another_certificate_is_seen_at_the_next_scrape_until_it_is_put_right(tmp_path: Path) -> None:
    authority = Authority("metrics")
    files = authority.issue().write(tmp_path)
    assert files.cert is not None
    assert files.key is not None
    key = files.key.read_bytes()
    metrics = shown(build(DecodeConfig, {"tls_cert": str(files.cert), "tls_key": str(files.key)}))
    assert failed(metrics, "tls") == 0
    replace(files.key, authority.issue().key)
    assert failed(metrics, "tls") == 1
    # What was read before is what is in use.
    assert days_left(metrics, "tls_cert") == pytest.approx(1, abs=0.01)
    replace(files.key, key)
    assert failed(metrics, "tls") == 0


def test_each_file_of_tokens_is_looked_at(tmp_path: Path) -> None:
    accepted, sent = tmp_path / "accepted", tmp_path / "sent"
    for path in (accepted, sent):
        path.write_text(TOKEN)
    config = build(PrefillConfig, {"token_file": str(accepted), "decode_token_file": str(sent)})
    metrics = shown(config)
    replace(sent, b"short\n")
    assert (failed(metrics, "token_file"), failed(metrics, "decode_token_file")) == (0, 1)
    sent.unlink()
    assert failed(metrics, "decode_token_file") == 1


def test_without_files_there_is_nothing_to_alert_of() -> None:
    metrics = shown(build(DecodeConfig, {}))
    assert days_left(metrics, "tls_cert") is None
    assert failed(metrics, "tls") is None


def test_of_a_chain_the_first_to_expire_counts() -> None:
    authority = Authority("metrics")
    chain = authority.issue(lasts=timedelta(days=5)).cert + authority.cert
    assert first_expiry(chain) - time.time() == pytest.approx(DAY_SECONDS, rel=0.01)
