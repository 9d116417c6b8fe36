"""The dashboard's panels, and their queries as Grafana sends them to Prometheus."""

import json
import re
from typing import Any

from tests.docker.deployment import DASHBOARD, recorded_expressions

DOCUMENT: dict[str, Any] = json.loads(DASHBOARD.read_text())
PANELS: list[dict[str, Any]] = [panel for panel in DOCUMENT["panels"] if panel["type"] != "row"]
EXPRESSIONS: list[str] = [target["expr"] for panel in PANELS for target in panel["targets"]]


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
