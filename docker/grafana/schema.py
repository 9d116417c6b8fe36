"""Compare the dashboards with the models that Grafana publishes of their JSON: they must know every field.

python docker/grafana/schema.py        # needs grafana-foundation-sdk; `make lint-kubernetes` brings it
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

FOLDER = Path(__file__).parent / "dashboards"
# Fields of a data source's own annotations, which the models leave open.
OPEN = ("titleFormat",)


def lost(written: Any, known: Any, place: str = "") -> Iterator[str]:
    """Yield each place whose value the models do not give back as it was written."""
    if isinstance(written, dict) and isinstance(known, dict):
        for key, value in written.items():
            if key not in OPEN:
                yield from lost(value, known.get(key), f"{place}.{key}")
    elif isinstance(written, list) and isinstance(known, list) and len(written) == len(known):
        for number, (one, other) in enumerate(zip(written, known, strict=True)):
            yield from lost(one, other, f"{place}[{number}]")
    elif written != known:
        yield f"{place} is {written!r}, of which Grafana's models keep {known!r}"


def problems_of(file: Path) -> list[str]:
    """Print how much of a dashboard Grafana's models do not know.

    Args:
        file: of the dashboard.

    Returns:
        A text for each place that they do not know.
    """
    written = json.loads(file.read_text(encoding="utf-8"))
    known = json.loads(JSONEncoder(sort_keys=True).encode(Dashboard.from_json(written)))
    problems = list(lost(written, known))
    sys.stdout.write(
        f"{file.name}: {len(written['panels'])} panels, {len(problems)} fields that Grafana does not know\n"
    )
    return problems


def main() -> int:
    """Print what Grafana's models do not know of the dashboards.

    Returns:
        The exit status: 1 where there is anything.
    """
    plugins.register_default_plugins()
    problems = [problem for file in sorted(FOLDER.glob("*.json")) for problem in problems_of(file)]
    for problem in problems:
        sys.stderr.write(f"{problem}\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
