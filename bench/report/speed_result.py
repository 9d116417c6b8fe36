"""How benches of speed write their results: with the load that the machine had before they began."""

import argparse
import os
from collections.abc import Mapping, Sequence
from typing import Any

from spectrumkv.bench.report.meta import describe_run
from spectrumkv.client.cli.json_output import write_json


def load_average() -> float | None:
    """Processes that wanted a core in the last minute, on average; None where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def write_speed_result(
    destination: str,
    arguments: argparse.Namespace,
    rows: Sequence[Mapping[str, Any]],
    model: Mapping[str, Any] | None,
    load_before: float | None,
) -> None:
    """Write `{"meta": …, "rows": […]}`, the load before the run in `meta`.

    Args:
        destination: a path, or "-" for standard output.
        arguments: of the command.
        rows: the results.
        model: see `meta.describe_model`; None where no model took part.
        load_before: see `load_average`.

    Raises:
        InvalidArgumentError: the file cannot be written.
    """
    meta = describe_run(arguments, model) | {
        "load_average_before": load_before,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "niceness": os.nice(0),
    }
    write_json({"meta": meta, "rows": [dict(one) for one in rows]}, destination)
