import math
import shutil
import subprocess
import urllib.request

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.service.config import Address
from spectrumkv.common.telemetry.metrics import LATENCY_BUCKETS, Metrics

# Name, type and labels, as operators and dashboards know them.
METRICS = {
    "spectrumkv_time_to_first_token_seconds": ("histogram", ()),
    "spectrumkv_handoff_seconds": ("histogram", ()),
    "spectrumkv_inter_token_latency_seconds": ("histogram", ()),
    "spectrumkv_request_duration_seconds": ("histogram", ("stage",)),
    "spectrumkv_kv_bytes_sent_total": ("counter", ("tier",)),
    "spectrumkv_kv_bytes_received_total": ("counter", ("tier",)),
    "spectrumkv_kv_fp16_equivalent_bytes_total": ("counter", ()),
    "spectrumkv_kv_codec_total": ("counter", ("codec",)),
    "spectrumkv_kv_tokens_total": ("counter", ("tier",)),
    "spectrumkv_requests_total": ("counter", ("code",)),
    "spectrumkv_silent_calls_ended_total": ("counter", ("reason",)),
    "spectrumkv_connections_closed_total": ("counter", ("reason",)),
    "spectrumkv_requests_running": ("gauge", ()),
    "spectrumkv_requests_waiting": ("gauge", ()),
    "spectrumkv_kv_slots_used_ratio": ("gauge", ()),
    "spectrumkv_kv_slots_free_run_ratio": ("gauge", ()),
    "spectrumkv_kv_bytes_resident": ("gauge", ()),
    "spectrumkv_chunks_rejected_total": ("counter", ("reason",)),
    "spectrumkv_decode_workers_passed_over_total": ("counter", ("reason",)),
    "spectrumkv_decode_worker_accepting": ("gauge", ("worker",)),
    "spectrumkv_decode_worker_ejected": ("gauge", ("worker",)),
    "spectrumkv_decode_worker_slots_free": ("gauge", ("worker",)),
    "spectrumkv_decode_name_resolved": ("gauge", ("name",)),
    "spectrumkv_certificate_expiry_timestamp_seconds": ("gauge", ("file",)),
    "spectrumkv_file_reload_failed": ("gauge", ("files",)),
    "spectrumkv_kernel_faults": ("gauge", ()),
    "spectrumkv_decode_worker_token_seconds": ("gauge", ("worker",)),
    "spectrumkv_int4_probe_passed": ("gauge", ()),
    "spectrumkv_probe_safe_budget_ratio": ("gauge", ()),
    "spectrumkv_decode_steps_total": ("counter", ("outcome",)),
    "spectrumkv_prompt_tokens_recomputed_total": ("counter", ()),
    "spectrumkv_log_lines_dropped_total": ("counter", ()),
    "spectrumkv_build_info": ("gauge", ("version", "service", "model")),
}


def touched(metrics: Metrics) -> Metrics:
    """Give every labelled metric a sample."""
    metrics.request_duration.labels("queue").observe(0.5)
    for counter in (metrics.kv_bytes_sent, metrics.kv_bytes_received, metrics.kv_tokens):
        counter.labels("FP16").inc(3)
    metrics.requests.labels("OK").inc()
    metrics.silent_calls_ended.labels("time").inc()
    metrics.connections_closed.labels("address").inc()
    metrics.kv_codec.labels("spectral").inc()
    metrics.chunks_rejected.labels("crc").inc()
    metrics.decode_workers_passed_over.labels("full").inc()
    metrics.decode_steps.labels("ok").inc()
    for worker in (
        metrics.decode_worker_accepting,
        metrics.decode_worker_ejected,
        metrics.decode_worker_slots_free,
        metrics.decode_worker_token_seconds,
    ):
        worker.labels("127.0.0.1:50052").set(1)
    metrics.decode_name_resolved.labels("decode:50052").set(1)
    metrics.files.certificate_expiry.labels("tls_cert").set(1)
    metrics.files.reload_failed.labels("tls").set(1)
    return metrics


def exposition(metrics: Metrics) -> str:
    return generate_latest(metrics.registry).decode()


def families(text):
    """Name as operators write it -> family; the parser cuts the `_total` of counters."""
    parsed = {}
    for family in text_string_to_metric_families(text):
        parsed[family.name + ("_total" if family.type == "counter" else "")] = family
    return parsed


def test_names_types_and_labels_are_those_that_dashboards_know():
    metrics = touched(Metrics(CollectorRegistry()))
    metrics.build_info.labels("1", "prefill", "tiny").set(1)
    found = {
        name: (family.type, tuple(family.samples[0].labels.keys() - {"le"}))
        for name, family in families(exposition(metrics)).items()
        if not name.endswith("_created")
    }
    assert {name: (kind, set(labels)) for name, (kind, labels) in found.items()} == {
        name: (kind, set(labels)) for name, (kind, labels) in METRICS.items()
    }


def test_every_metric_has_help():
    for family in families(exposition(touched(Metrics(CollectorRegistry())))).values():
        assert family.documentation.endswith(".")


def test_latency_buckets_rise_from_a_millisecond_to_2560_seconds():
    assert list(LATENCY_BUCKETS) == sorted(set(LATENCY_BUCKETS))
    assert (LATENCY_BUCKETS[0], LATENCY_BUCKETS[-1]) == (0.001, 2560.0)
    for name, (kind, _) in METRICS.items():
        if kind == "histogram":
            family = families(exposition(touched(Metrics(CollectorRegistry()))))[name]
            bounds = [float(one.labels["le"]) for one in family.samples if one.name.endswith("_bucket")]
            assert bounds == [*LATENCY_BUCKETS, math.inf]


def test_a_process_exposes_what_it_is_and_what_it_uses():
    found = families(exposition(Metrics.for_process("prefill", 'a "model"\n')))
    assert found["process_resident_memory_bytes"].samples[0].value > 0
    assert "process_open_fds" in found
    [build] = found["spectrumkv_build_info"].samples
    assert build.value == 1
    assert (build.labels["service"], build.labels["model"]) == ("prefill", 'a "model"\n')


def test_two_processes_metrics_live_side_by_side():
    one, two = Metrics(CollectorRegistry()), Metrics(CollectorRegistry())
    one.requests.labels("OK").inc()
    assert two.registry.get_sample_value("spectrumkv_requests_total", {"code": "OK"}) is None


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_scrape_is_answered(host):
    metrics = touched(Metrics.for_process("decode", "tiny"))
    port = metrics.serve(Address(host, 0))
    with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=10) as answer:
        assert answer.headers.get_content_type() == "text/plain"
        scraped = families(answer.read().decode())
    assert set(METRICS) <= set(scraped)


def test_an_ipv6_address_is_served():
    metrics = Metrics(CollectorRegistry())
    try:
        port = metrics.serve(Address("[::1]", 0))
    except InvalidArgumentError as error:
        pytest.skip(f"no IPv6 here: {error.message}")
    with urllib.request.urlopen(f"http://[::1]:{port}/metrics", timeout=10) as answer:
        assert answer.status == 200


def test_a_port_in_use_is_refused_with_a_sentence():
    metrics = Metrics(CollectorRegistry())
    port = metrics.serve(Address("127.0.0.1", 0))
    with pytest.raises(InvalidArgumentError, match=f"cannot serve metrics on 127.0.0.1:{port}: .*in use"):
        metrics.serve(Address("127.0.0.1", port))


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_finds_nothing_to_say():
    ours = "".join(
        line
        for line in exposition(touched(Metrics(CollectorRegistry()))).splitlines(keepends=True)
        if "_created" not in line
    )
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=ours, capture_output=True, text=True, timeout=30, check=False
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")
