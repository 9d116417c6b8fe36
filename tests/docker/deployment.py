"""The deployment's files as Compose and Prometheus read them."""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from prometheus_client import CollectorRegistry

from spectrumkv.common.telemetry.metrics import Metrics
from spectrumkv.gateway.metrics import GatewayMetrics
from spectrumkv.vllm_plugin.proxy.metrics import ProxyMetrics
from spectrumkv.vllm_plugin.stats import COUNTERS, GAUGES

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
PROMETHEUS = DOCKER / "prometheus"
DASHBOARDS = DOCKER / "grafana" / "dashboards"
# Of the services and the gateway; the other one is of vLLM's servers.
DASHBOARD, VLLM_DASHBOARD = DASHBOARDS / "spectrumkv.json", DASHBOARDS / "spectrumkv-vllm.json"
OPERATIONS = ROOT / "docs" / "operations.md"
COMPOSE_FILES = {"gpu": DOCKER / "compose.yaml", "cpu": DOCKER / "compose.cpu.yaml"}
SERVICES = ("prefill", "decode")


class Reset:
    """What Compose's tag `!reset` leaves: the key of the file underneath is removed."""


class ComposeLoader(yaml.SafeLoader):
    """YAML with Compose's tag."""


ComposeLoader.add_constructor("!reset", lambda loader, node: Reset())


def read_compose(path: Path) -> Any:
    return yaml.load(path.read_text(), ComposeLoader)


def interpolate(text: str, environment: Mapping[str, str]) -> str:
    """Replace `${NAME:-default}` and `${NAME:+replacement}`, which may hold another `${…}` themselves."""

    def value(match: re.Match[str]) -> str:
        given = environment.get(match["name"], "")
        inner = interpolate(match["word"] or "", environment)
        return {":-": given or inner, ":+": given and inner, None: given}[match["operator"]]

    return re.sub(r"\$\{(?P<name>\w+)(?:(?P<operator>:[-+])(?P<word>(?:[^{}]|\$\{[^{}]*\})*))?\}", value, text)


def command(file: str, service: str, **environment: str) -> list[str]:
    """The program and arguments that Compose starts a service with."""
    text = read_compose(COMPOSE_FILES[file])["services"][service]["command"]
    return shlex.split(interpolate(text, environment))


def metric_names() -> set[str]:
    """Every series name that a service or the gateway exposes."""
    return _names(Metrics(CollectorRegistry()).registry) | _names(GatewayMetrics(CollectorRegistry()).registry)


def _names(registry: CollectorRegistry) -> set[str]:
    suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"], "gauge": [""]}
    return {family.name + suffix for family in registry.collect() for suffix in suffixes[family.type]}


def vllm_metric_names() -> set[str]:
    """Every series name that the connector adds to vLLM's, or that the proxy exposes."""
    return {f"spectrumkv:{name}" for name in (*COUNTERS, *GAUGES)} | _names(ProxyMetrics().registry)


def recorded_expressions() -> dict[str, str]:
    """Recording rules: name to expression."""
    groups = yaml.safe_load((PROMETHEUS / "rules" / "recording.yml").read_text())["groups"]
    return {rule["record"]: rule["expr"] for group in groups for rule in group["rules"]}


def alert_rules() -> dict[str, Any]:
    """Alert rules by name."""
    groups = yaml.safe_load((PROMETHEUS / "rules" / "alerts.yml").read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def unknown_metrics(expression: str) -> set[str]:
    """Names in a PromQL expression that look like ours and that nothing exposes or records."""
    without_strings = re.sub(r'"[^"]*"', '""', expression)
    named = set(re.findall(r"\b(?:[a-z_]+:)?spectrumkv[_:][\w:]+", without_strings))
    return named - metric_names() - vllm_metric_names() - recorded_expressions().keys()
