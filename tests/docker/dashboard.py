"""The dashboards' panels, and their queries as Grafana sends them to Prometheus."""

import json
import re
from typing import Any

from tests.docker.deployment import DASHBOARD, VLLM_DASHBOARD, recorded_expressions


def panels(document: dict[str, Any]) -> list[dict[str, Any]]:
    """What a dashboard shows, without its headings."""
    return [panel for panel in document["panels"] if panel["type"] != "row"]


def expressions(document: dict[str, Any]) -> list[str]:
    """All queries of a dashboard."""
    return [target["expr"] for panel in panels(document) for target in panel["targets"]]


DOCUMENTS: dict[str, dict[str, Any]] = {
    path.stem: json.loads(path.read_text()) for path in (DASHBOARD, VLLM_DASHBOARD)
}
# Those of the services and the gateway.
PANELS, EXPRESSIONS = panels(DOCUMENTS[DASHBOARD.stem]), expressions(DOCUMENTS[DASHBOARD.stem])


def as_promql(expression: str, rate_interval: str = "1m") -> str:
    """The expression with Grafana's variables filled in as Grafana does with everything selected."""
    replaced = expression.replace("$__rate_interval", rate_interval)
    replaced = replaced.replace("$job", ".+").replace("$instance", ".+")
    assert "$" not in replaced
    return replaced


def without_records(expression: str) -> str:
    """The expression with each recorded series replaced by what it is recorded from."""
    for name, recorded in recorded_expressions().items():
        expression = re.sub(re.escape(name) + r"(\{[^}]*\})?", f"({recorded})", expression)
    return expression
