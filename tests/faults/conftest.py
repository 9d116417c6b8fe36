from collections.abc import Iterator
from typing import Any

import pytest

from tests.faults.incubator import Incubator
from tests.faults.matrix.kinds import PROMPT_FAULTS, SILENT_FAULTS
from tests.faults.matrix.phases import PHASES


@pytest.fixture(scope="session")
def incubator() -> Iterator[Incubator]:
    """One for all tests of a pytest process: importing everything takes seconds, and nothing of a service stays."""
    with Incubator() as one:
        yield one


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave one way of each fault and phase, in turn the one and the other, to runs that are exhaustive."""
    faults = [fault.name for fault in (*SILENT_FAULTS, *PROMPT_FAULTS)]
    for item in items:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if {"fault", "phase", "secured"} <= parameters.keys():
            place = faults.index(parameters["fault"].name) + list(PHASES).index(parameters["phase"])
            if parameters["secured"] != bool(place % 2):
                item.add_marker(pytest.mark.exhaustive)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say how many faults were injected, and how soon clients were told."""
    told: dict[str, list[float]] = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            properties = dict(report.user_properties) if report.when == "call" else {}
            if "fault" in properties:
                told.setdefault(properties["fault"], []).append(properties.get("told_after", 0.0))
    if told:
        terminalreporter.write_line(f"{sum(map(len, told.values()))} faults injected on real processes")
        for fault, seconds in told.items():
            terminalreporter.write_line(f"  {fault}: {len(seconds)} phases, clients told within {max(seconds):.2f} s")
