"""Shows what workers counted in vLLM's log and at its Prometheus endpoint."""

from typing import Any

from prometheus_client import Counter, Gauge
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from spectrumkv.vllm_plugin.stats import COUNTERS, GAUGES, added, shown


class EngineStats(KVConnectorStats):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """Counts of one interval; `data` is a `Counts`, which crosses between processes as it is."""

    def reset(self) -> None:
        """Forget everything."""
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> "EngineStats":
        """Add another worker's or interval's counts.

        Args:
            other: the counts.

        Returns:
            The sums.
        """
        return EngineStats(data=added(self.data, other.data))

    def reduce(self) -> dict[str, int | float]:
        """Show the counts as vLLM's log line has them.

        Returns:
            Numbers by metric and label.
        """
        return shown(self.data)

    def is_empty(self) -> bool:
        """Return whether nothing was counted."""
        return not self.data


class EngineMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """Counters and gauges `spectrumkv:…` at vLLM's own `/metrics`."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        counter = metric_types[Counter]
        self._counters = {
            name: counter(
                name=f"spectrumkv:{name.removesuffix('_total')}", documentation=text, labelnames=[*labelnames, label]
            )
            for name, (text, label) in COUNTERS.items()
        }
        gauge = metric_types[Gauge]
        self._gauges = {
            # Changes are added up, so that what several API servers saw is summed.
            name: gauge(
                name=f"spectrumkv:{name}", documentation=text, labelnames=labelnames, multiprocess_mode="livesum"
            )
            for name, text in GAUGES.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add the counts of an interval."""
        values = self.per_engine_labelvalues[engine_idx]
        for metric, labels in transfer_stats_data.items():
            if metric in self._gauges:
                self._gauges[metric].labels(*values).inc(sum(labels.values()))
                continue
            for label, number in labels.items():
                self._counters[metric].labels(*values, label).inc(number)
