"""Declare the gateway's own metrics; docs/gateway.md explains them."""

from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector

from spectrumkv.common.security import TlsFiles
from spectrumkv.common.security.file_metrics import FileMetrics
from spectrumkv.common.telemetry.metrics import LATENCY_BUCKETS
from spectrumkv.gateway.config import GatewayConfig


class GatewayMetrics:
    """Hold the metrics of one gateway.

    Args:
        registry: the registry of the metrics; each gateway has one of its own.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.requests = Counter(
            "spectrumkv_gateway_requests_total",
            "HTTP requests that ended, by route and status; 499 is a caller that went away.",
            ("route", "status"),
            registry=registry,
        )
        self.running = Gauge(
            "spectrumkv_gateway_requests_running", "HTTP requests that are in the gateway now.", registry=registry
        )
        self.connections = Gauge(
            "spectrumkv_gateway_connections", "Connections that are open now.", registry=registry
        )
        self.time_to_first_token = Histogram(
            "spectrumkv_gateway_time_to_first_token_seconds",
            "Time from a request's arrival at the gateway to its first token.",
            buckets=LATENCY_BUCKETS,
            registry=registry,
        )
        self.log_lines_dropped = Counter(
            "spectrumkv_log_lines_dropped_total",
            "Log lines that were dropped, because nobody read them or the disk was full.",
            registry=registry,
        )
        self.files = FileMetrics(registry)
        build = Gauge(
            "spectrumkv_build_info",
            "Always 1; its labels say what runs here.",
            ("version", "service", "model"),
            registry=registry,
        )
        build.labels(version("spectrumkv"), "gateway", "").set(1)

    @classmethod
    def for_process(cls) -> "GatewayMetrics":
        """Return the metrics of a gateway's process, with the usual ones of memory, files and threads."""
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        return cls(registry)

    def show_files(self, config: GatewayConfig) -> None:
        """Have each scrape look at the files that the gateway follows.

        Args:
            config: names the files.

        Raises:
            InvalidArgumentError: a file cannot be used.
        """
        self.files.show_certificates(TlsFiles.named(config.tls_cert, config.tls_key, None))
        self.files.show_certificates(config.prefill_files)
        self.files.show_tokens("token_file", config.token_file)
        self.files.show_tokens("prefill_token_file", config.prefill_token_file)
