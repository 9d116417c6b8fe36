"""A real Prometheus scrapes both services."""

import shutil
import time
from pathlib import Path

import pytest

from spectrumkv.client.client import SpectrumClient
from spectrumkv.client.completion import Usage
from spectrumkv.client.local.running_pair import RunningPair
from spectrumkv.client.request import KvChoice, Sampling, TokenIds
from tests.docker.prometheus_server import query, running_prometheus

pytestmark = pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed")

PREFILL = "{job='spectrumkv-prefill'}"
CONFIG = """
global: {{scrape_interval: 1s}}
scrape_configs:
  - job_name: spectrumkv-prefill
    static_configs: [{{targets: ["{prefill}"]}}]
  - job_name: spectrumkv-decode
    static_configs: [{{targets: ["{decode}"]}}]
"""


def test_it_returns_ttft_and_bytes_by_tier(process_pair: RunningPair, tmp_path: Path) -> None:
    usages = [generate(process_pair, budget) for budget in (1.0, 0.7, 0.3)]
    targets = {"prefill": process_pair.prefill.metrics_address, "decode": process_pair.decode.metrics_address}
    (tmp_path / "prometheus.yml").write_text(CONFIG.format(**targets))
    with running_prometheus(tmp_path) as url:
        wait_for(url, f"spectrumkv_time_to_first_token_seconds_count{PREFILL}", 3)
        wait_for(url, "sum(spectrumkv_requests_total{job='spectrumkv-decode',code='OK'})", 3)
        ttft = value(url, f"spectrumkv_time_to_first_token_seconds_sum{PREFILL}")
        assert ttft == pytest.approx(sum(usage.ttft_seconds for usage in usages))
        handoff = value(url, f"spectrumkv_handoff_seconds_sum{PREFILL}")
        assert handoff == pytest.approx(sum(usage.handoff_seconds for usage in usages))
        for tier in ("fp16", "int8", "int4"):
            expected = sum(one.bytes for usage in usages for one in usage.tiers if one.tier == tier)
            assert expected > 0
            assert value(url, f"spectrumkv_kv_bytes_sent_total{{tier='{tier}'}}") == expected
            assert value(url, f"spectrumkv_kv_bytes_received_total{{tier='{tier}'}}") == expected
        sent = sum(usage.kv_bytes_sent for usage in usages)
        assert value(url, "sum(spectrumkv_kv_bytes_sent_total{tier!='basis'})") == sent
        assert value(url, "sum(spectrumkv_kv_bytes_received_total{tier!='basis'})") == sent
        assert value(url, "sum(spectrumkv_kv_fp16_equivalent_bytes_total{job='spectrumkv-prefill'})") == sum(
            usage.kv_fp16_bytes for usage in usages
        )
        assert value(url, "sum(spectrumkv_prompt_tokens_recomputed_total)") == 0
        assert value(url, "spectrumkv_kv_bytes_resident{job='spectrumkv-decode'}") == 0


def generate(pair: RunningPair, budget: float) -> Usage:
    with SpectrumClient(pair.address) as client:
        stream = client.generate(
            TokenIds(tuple(range(100, 180))),
            sampling=Sampling(max_tokens=6, ignore_eos=True),
            kv=KvChoice(policy="greedy", budget=budget),
        )
        return stream.result().usage


def wait_for(url: str, expression: str, expected: float) -> None:
    """Ask again until the scrape has come round; a query takes milliseconds, a scrape a second."""
    deadline = time.monotonic() + 30
    while (seen := query(url, expression, time=None)) == [] or float(seen[0]["value"][1]) != expected:
        assert time.monotonic() < deadline, f"{expression} is {seen}, not {expected}"


def value(url: str, expression: str) -> float:
    [series] = query(url, expression, time=None)
    return float(series["value"][1])
