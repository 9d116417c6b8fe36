"""Write the rules of docker/prometheus as the PrometheusRule that the Prometheus operator reads.

python docker/kubernetes/prometheus_rule.py            # writes components/monitoring/prometheus-rule.yaml
"""

from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
RULES = HERE.parent / "prometheus" / "rules"
MANIFEST = HERE / "components" / "monitoring" / "prometheus-rule.yaml"
HEADER = "# Written by docker/kubernetes/prometheus_rule.py from docker/prometheus/rules; change those.\n"


def manifest() -> str:
    """Return the manifest's text: every group of every file of rules, in the order of their names."""
    groups: list[Any] = []
    for path in sorted(RULES.glob("*.yml")):
        groups += yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]
    resource = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "spectrumkv"},
        "spec": {"groups": groups},
    }
    return HEADER + yaml.safe_dump(resource, sort_keys=False, width=118, allow_unicode=True)


if __name__ == "__main__":
    MANIFEST.write_text(manifest(), encoding="utf-8")
