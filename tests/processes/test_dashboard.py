"""The dashboard's queries are put to a Prometheus that scrapes both services and the gateway while they serve."""

import json
import re
import shutil
import time
import urllib.request
from pathlib import Path

import pytest

from spectrumkv.client.local.gateway_process import running_gateway
from spectrumkv.client.local.running_pair import RunningPair
from spectrumkv.common.service.options import Address
from tests.common.rpc.test_readiness import free_address
from tests.docker.dashboard import EXPRESSIONS, as_promql
from tests.docker.deployment import PROMETHEUS
from tests.docker.prometheus_server import query, running_prometheus

pytestmark = pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed")

CONFIG = """
global: {{scrape_interval: 1s, evaluation_interval: 1s}}
rule_files: ["{rules}/*.yml"]
scrape_configs:
  - job_name: spectrumkv-prefill
    static_configs: [{{targets: ["{prefill}"]}}]
  - job_name: spectrumkv-decode
    static_configs: [{{targets: ["{decode}"]}}]
  - job_name: spectrumkv-gateway
    static_configs: [{{targets: ["{gateway}"]}}]
"""
# What has a series once it happens, or where files and names are given: none of it does in a run without trouble.
EVENTS = {
    "ALERTS",
    "spectrumkv_certificate_expiry_timestamp_seconds",
    "spectrumkv_chunks_rejected_total",
    "spectrumkv_connections_closed_total",
    "spectrumkv_decode_name_resolved",
    "spectrumkv_decode_workers_passed_over_total",
    "spectrumkv_file_reload_failed",
    "spectrumkv_silent_calls_ended_total",
}
ANSWER_SECONDS = 60.0


def without_series(url: str) -> list[str]:
    """The queries that Prometheus takes and has no value for now."""
    asked = {expression: as_promql(expression, "10s") for expression in EXPRESSIONS}
    found = {expression: query(url, text, time=None) for expression, text in asked.items()}
    return [
        expression
        for expression, series in found.items()
        # Decode has no time to a first token.
        if not series
        or any(one["value"][1] == "NaN" for one in series if one["metric"].get("job") != "spectrumkv-decode")
    ]


def complete(gateway: Address) -> None:
    """Read a stream to its end."""
    asked = {"prompt": list(range(100, 180)), "max_tokens": 6, "ignore_eos": True, "stream": True}
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"http://{gateway}/v1/completions", json.dumps(asked).encode(), headers)
    with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
        assert answer.read().endswith(b"data: [DONE]\n\n")


@pytest.mark.slow
def test_every_query_has_a_value_in_a_run(process_pair: RunningPair, tmp_path: Path) -> None:
    http = Address.parse(free_address())
    targets = {
        "prefill": process_pair.prefill.metrics_address, "decode": process_pair.decode.metrics_address,
        "gateway": http,
    }  # fmt: skip
    (tmp_path / "prometheus.yml").write_text(CONFIG.format(rules=PROMETHEUS / "rules", **targets))
    of_events = {one for one in EXPRESSIONS if EVENTS & set(re.findall(r"\w+", one)) and "vector(0)" not in one}
    began = time.monotonic()
    with running_prometheus(tmp_path) as url, running_gateway(process_pair, http, {}, lambda name, line: None):
        # Rates need requests between scrapes.
        while empty := set(without_series(url)) - of_events:
            assert time.monotonic() - began < ANSWER_SECONDS, empty
            complete(http)
        assert query(url, 'ALERTS{alertname=~"SpectrumKV.*",alertstate="firing"}', time=None) == []
