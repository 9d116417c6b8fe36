from typing import Any


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
