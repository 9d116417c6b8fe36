"""A Prometheus that holds what the metrics of all processes would have been, to put the dashboards' queries to."""

import json
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from spectrumkv.common.telemetry.metrics import FRAMING, Metrics
from spectrumkv.gateway.metrics import GatewayMetrics
from spectrumkv.vllm_plugin.proxy.metrics import ProxyMetrics
from spectrumkv.vllm_plugin.stats import COUNTERS, GAUGES

START = 1_700_000_000
STEPS = 60
STEP_SECONDS = 5
END = START + (STEPS - 1) * STEP_SECONDS


def _serve_one_request(prefill: Metrics, decode: Metrics) -> None:
    for tier in ("fp16", "int8", "int4", "drop", FRAMING):
        prefill.kv_bytes_sent.labels(tier).inc(100)
        decode.kv_bytes_received.labels(tier).inc(100)
        if tier != FRAMING:
            prefill.kv_tokens.labels(tier).inc(10)
    prefill.kv_codec.labels("spectral").inc()
    prefill.kv_fp16_equivalent_bytes.inc(1000)
    decode.kv_fp16_equivalent_bytes.inc(1000)
    prefill.time_to_first_token.observe(0.2)
    prefill.handoff.observe(0.05)
    decode.inter_token_latency.observe(0.02)
    for stage in ("queue", "prefill", "encode", "transfer"):
        prefill.request_duration.labels(stage).observe(0.1)
    decode.request_duration.labels("decode").observe(0.1)
    for metrics in (prefill, decode):
        metrics.requests.labels("OK").inc()
        metrics.requests_running.set(1)
    decode.chunks_rejected.labels("crc32c").inc()
    decode.decode_steps.labels("ok").inc()
    prefill.decode_worker_accepting.labels("decode:1").set(1)
    prefill.decode_worker_slots_free.labels("decode:1").set(1000)
    prefill.decode_workers_passed_over.labels("full").inc()
    prefill.decode_worker_ejected.labels("127.0.0.1:50052").set(0)
    prefill.decode_worker_token_seconds.labels("decode:1").set(0.02)
    prefill.silent_calls_ended.labels("time").inc()
    prefill.decode_name_resolved.labels("decode:50052").set(1)
    for metrics in (prefill, decode):
        metrics.files.certificate_expiry.labels("tls_cert").set(2e9)
        metrics.files.reload_failed.labels("tls").set(0)
    prefill.connections_closed.labels("address").inc()


class VllmMetrics:
    """What a vLLM server with the connector exposes, as far as the dashboard asks for it."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._counters = [
            (Counter(f"spectrumkv:{name}", text, [label], registry=self.registry), label)
            for name, (text, label) in COUNTERS.items()
        ]
        self._gauges = [Gauge(f"spectrumkv:{name}", text, registry=self.registry) for name, text in GAUGES.items()]
        self._computed = Histogram("vllm:iteration_tokens_total", "Tokens of each step.", registry=self.registry)

    def serve_one_request(self) -> None:
        for counter, label in self._counters:
            counter.labels({"tier": "int8", "codec": "spectral"}.get(label, "not_found")).inc(100)
        for gauge in self._gauges:
            gauge.set(100)
        self._computed.observe(8)


def _history() -> str:
    """The metrics of all processes over five minutes, as OpenMetrics with timestamps."""
    prefill, decode = (Metrics.for_process(service, "model") for service in ("prefill", "decode"))
    gateway = GatewayMetrics.for_process()
    vllm, proxy = VllmMetrics(), ProxyMetrics()
    registries = {
        "spectrumkv-prefill": prefill.registry, "spectrumkv-decode": decode.registry,
        "spectrumkv-gateway": gateway.registry, "vllm": vllm.registry, "vllm-proxy": proxy.registry,
    }  # fmt: skip
    lines: dict[str, list[str]] = {}
    for step in range(STEPS):
        _serve_one_request(prefill, decode)
        gateway.requests.labels("/v1/completions", "200").inc()
        gateway.time_to_first_token.observe(0.2)
        vllm.serve_one_request()
        proxy.requests.labels("ok").inc()
        proxy.retries.labels("decode").inc()
        proxy.time_to_first_token.observe(0.2)
        proxy.servers_healthy.labels("decode").set(1)
        for job, registry in registries.items():
            where = {"job": job, "instance": f"{job.removeprefix('spectrumkv-')}:1"}
            samples: list[tuple[str, dict[str, str], float]] = [("up", {}, 1.0)]
            for family in registry.collect():
                samples += [(sample.name, sample.labels, sample.value) for sample in family.samples]
            for name, labels, value in samples:
                text = ",".join(f'{key}="{given}"' for key, given in (where | labels).items())
                lines.setdefault(name, []).append(f"{name}{{{text}}} {value} {START + step * STEP_SECONDS}")
    families = (f"# TYPE {name} unknown\n" + "\n".join(samples) for name, samples in lines.items())
    return "\n".join(families) + "\n# EOF\n"


@contextmanager
def recorded_prometheus(folder: Path) -> Iterator[str]:
    """Run a Prometheus over five recorded minutes of all processes and yield its URL."""
    (folder / "history.txt").write_text(_history())
    (folder / "prometheus.yml").write_text("{}")
    subprocess.run(
        ["promtool", "tsdb", "create-blocks-from", "openmetrics", folder / "history.txt", folder / "data"],
        check=True,
        capture_output=True,
        timeout=60,
    )
    with running_prometheus(folder, "--storage.tsdb.retention.time=100y") as url:
        yield url


@contextmanager
def running_prometheus(folder: Path, *options: str) -> Iterator[str]:
    """Run a Prometheus with the configuration and the data in a folder and yield its URL."""
    server = subprocess.Popen(
        [
            "prometheus",
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            "--web.listen-address=127.0.0.1:0",
            "--log.format=json",
            *options,
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield f"http://{_address_when_ready(server)}"
    finally:
        server.terminate()
        server.communicate(timeout=30)


def _address_when_ready(server: "subprocess.Popen[str]") -> str:
    assert server.stderr is not None
    address, ready, log = "", False, []
    for line in server.stderr:
        log.append(line)
        entry = json.loads(line)
        # In either order: different threads of it say so.
        if entry.get("msg") == "Listening on":
            address = entry["address"]
        ready = ready or entry.get("msg", "").startswith("Server is ready")
        if address and ready:
            return address
    raise RuntimeError("Prometheus did not start:\n" + "".join(log))


def query(url: str, expression: str, time: float | None = END) -> list[Any]:
    """The series that an instant query gives, at the end of the recording or, without a time, now."""
    parameters = urllib.parse.urlencode({"query": expression} | ({} if time is None else {"time": time}))
    with urllib.request.urlopen(f"{url}/api/v1/query?{parameters}", timeout=30) as response:
        return list(json.load(response)["data"]["result"])
