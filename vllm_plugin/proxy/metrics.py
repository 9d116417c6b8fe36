"""Declares the proxy's own metrics; docs/vllm.md explains them."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from spectrumkv.common.telemetry.metrics import LATENCY_BUCKETS


class ProxyMetrics:
    """Holds the metrics of one proxy.

    Attributes:
        registry: of the metrics; each proxy has one of its own.
        requests: that ended, by outcome: ok, cancelled, or the status of the error.
        retries: by stage, prefill or decode.
        announcements_failed: of KV that decode did not receive ahead of its request.
        time_to_first_token: from a request's arrival to prefill's token.
        servers_healthy: by role.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "spectrumkv_proxy_requests", "Requests that ended, by how.", ["outcome"], registry=self.registry
        )
        self.retries = Counter(
            "spectrumkv_proxy_retries", "Further tries, by what was tried.", ["stage"], registry=self.registry
        )
        self.announcements_failed = Counter(
            "spectrumkv_proxy_announcements_failed",
            "Announcements of KV that a decode server refused or could not be told.",
            registry=self.registry,
        )
        self.time_to_first_token = Histogram(
            "spectrumkv_proxy_time_to_first_token_seconds",
            "Time from a request's arrival to its first token.",
            buckets=LATENCY_BUCKETS,
            registry=self.registry,
        )
        self.servers_healthy = Gauge(
            "spectrumkv_proxy_servers_healthy", "Servers that answer.", ["role"], registry=self.registry
        )
