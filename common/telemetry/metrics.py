"""Declares every metric of both services; docs/operations.md explains them to operators."""

from importlib.metadata import version

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)

from spectrumkv.common.security.file_metrics import FileMetrics
from spectrumkv.common.service.config import Address
from spectrumkv.common.telemetry.metrics_server import NO_PROBES, Probes, serve_metrics

# The buckets of vLLM's latency histograms, so that dashboards can compare.
LATENCY_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0,
    2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
# Label of bytes that belong to no tier: tier maps, segment headers, message framing, Begin and End.
FRAMING = "framing"
# Label of the bytes of a codec's basis, which each decode worker gets once.
BASIS = "basis"


class Metrics:
    """Holds the metrics of one process.

    Args:
        registry: the registry of the metrics; each test has one of its own.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry

        def histogram(name: str, help_text: str, *labels: str) -> Histogram:
            return Histogram(f"spectrumkv_{name}", help_text, labels, buckets=LATENCY_BUCKETS, registry=registry)

        def counter(name: str, help_text: str, *labels: str) -> Counter:
            return Counter(f"spectrumkv_{name}", help_text, labels, registry=registry)

        def gauge(name: str, help_text: str, *labels: str) -> Gauge:
            return Gauge(f"spectrumkv_{name}", help_text, labels, registry=registry)

        self.time_to_first_token = histogram(
            "time_to_first_token_seconds", "Time from a request's arrival at prefill to its first token."
        )
        self.handoff = histogram(
            "handoff_seconds", "Time from the first token (from prefill) to the second (from decode)."
        )
        self.inter_token_latency = histogram(
            "inter_token_latency_seconds", "Time between two tokens of a request, without the hand-off."
        )
        self.request_duration = histogram(
            "request_duration_seconds",
            "Time that a request spent in one stage; on prefill one observation for a request, however many decode "
            "workers it went to.",
            "stage",
        )
        self.kv_bytes_sent = counter(
            "kv_bytes_sent_total",
            "Bytes that prefill serialized for decode, for each dispatch of a request, by what they carry.",
            "tier",
        )
        self.kv_bytes_received = counter(
            "kv_bytes_received_total", "Bytes that decode received from prefill, by what they carry.", "tier"
        )
        self.kv_fp16_equivalent_bytes = counter(
            "kv_fp16_equivalent_bytes_total",
            "Bytes of the same KV at 16 bits per element, for each dispatch of a request.",
        )
        self.kv_tokens = counter(
            "kv_tokens_total",
            "Prompt tokens by tier, as a mean over the layers, for each dispatch of a request.",
            "tier",
        )
        self.requests = counter("requests_total", "Requests that ended, by gRPC status code.", "code")
        self.silent_calls_ended = counter(
            "silent_calls_ended_total", "Calls that were ended before their first message came, by why.", "reason"
        )
        self.connections_closed = counter(
            "connections_closed_total", "Connections that were closed by a limit of this server, by which.", "reason"
        )
        self.kv_codec = counter("kv_codec_total", "Requests by the codec of their KV.", "codec")
        self.requests_running = gauge("requests_running", "Requests that the model computes now.")
        self.requests_waiting = gauge("requests_waiting", "Admitted requests that wait for the model.")
        self.kv_slots_used_ratio = gauge("kv_slots_used_ratio", "Share of the KV slots that requests hold.")
        self.kv_slots_free_run_ratio = gauge(
            "kv_slots_free_run_ratio", "Longest run of neighbouring free KV slots, as a share of all slots."
        )
        self.kv_bytes_resident = gauge("kv_bytes_resident", "Bytes of the KV cache that requests hold.")
        self.chunks_rejected = counter(
            "chunks_rejected_total", "Messages of Decode streams that were refused, by what was wrong.", "reason"
        )
        self.decode_workers_passed_over = counter(
            "decode_workers_passed_over_total",
            "How often a request went on to another decode worker, by what was wrong with the one before.",
            "reason",
        )
        self.decode_worker_accepting = gauge(
            "decode_worker_accepting", "1 where a decode worker answers and takes requests, otherwise 0.", "worker"
        )
        self.decode_worker_ejected = gauge(
            "decode_worker_ejected",
            "1 where requests avoid a decode worker because it failed several in a row, otherwise 0.",
            "worker",
        )
        self.decode_worker_slots_free = gauge(
            "decode_worker_slots_free", "Free KV slots of a decode worker, as far as prefill knows.", "worker"
        )
        self.decode_name_resolved = gauge(
            "decode_name_resolved",
            "1 where the latest look-up of a name in --decode found addresses, otherwise 0.",
            "name",
        )
        self.files = FileMetrics(registry)
        self.kernel_faults = gauge(
            "kernel_faults", "1 where kernels of codec fixed_rate fail on this GPU and the CPU codes, otherwise 0."
        )
        self.decode_worker_token_seconds = gauge(
            "decode_worker_token_seconds",
            "Median time that the latest tokens of a decode worker took, as prefill saw it; 0 at first.",
            "worker",
        )
        self.int4_probe_passed = gauge(
            "int4_probe_passed", "1 where tokens of every layer may be sent at INT4, otherwise 0."
        )
        self.probe_safe_budget = gauge(
            "probe_safe_budget_ratio", "Least byte budget that the probe found safe; 0 where it found none."
        )
        self.decode_steps = counter("decode_steps_total", "Steps of decode's running batch, by outcome.", "outcome")
        self.prompt_tokens_recomputed = counter(
            "prompt_tokens_recomputed_total", "Prompt tokens that decode computed although it had their KV."
        )
        self.log_lines_dropped = counter(
            "log_lines_dropped_total", "Log lines that were dropped, because nobody read them or the disk was full."
        )
        self.build_info = gauge(
            "build_info", "Always 1; its labels say what runs here.", "version", "service", "model"
        )

    @classmethod
    def for_process(cls, service: str, model_name: str) -> "Metrics":
        """Return the metrics of a service's process, with the usual ones of memory, files and threads."""
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        metrics = cls(registry)
        metrics.build_info.labels(version("spectrumkv"), service, model_name).set(1)
        return metrics

    def serve(self, address: Address, probes: Probes = NO_PROBES) -> int:
        """Answer Prometheus, and those who ask whether the process lives and is ready, on threads of their own.

        Args:
            address: the address to listen on; port 0 is any free port.
            probes: by their paths, the questions that are answered with yes (200) or no (503).

        Returns:
            The port.

        Raises:
            InvalidArgumentError: the address cannot be bound.
        """
        return serve_metrics(
            self.registry, address, lambda reason: self.connections_closed.labels(reason).inc(), probes
        )
