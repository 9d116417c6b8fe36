"""Stage `kernels`: run the tests that compare every Triton kernel with its reference, on this machine's device.

The comparisons are the project's own tests, so the check runs in a checkout. On a GPU the kernels are compiled;
elsewhere Triton interprets them.
"""

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from spectrumkv.bench.device.report import StageReport
from spectrumkv.common.errors import FailedPreconditionError

ROOT = Path(__file__).resolve().parents[2]
TESTS = ("tests/kernels", "tests/common/kv/codecs")
# Left to pytest for its last test and its summary.
END_SECONDS = 5.0
OUTCOMES = ("passed", "failed", "skipped")


class OutcomeCounter:
    """Count outcomes for each test function, as a plugin of pytest, and end the session when time is over.

    Args:
        report: says how much time is left.
    """

    def __init__(self, report: StageReport) -> None:
        self._report = report
        self._session: pytest.Session | None = None
        self._outcomes: dict[str, Counter[str]] = {}
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self.collected = 0
        self.first_failure: str | None = None

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Note how many tests there are."""
        self._session = session
        self.collected = len(session.items)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test's outcome once: that of its call, or of a set-up or tear-down that did not pass."""
        function = report.nodeid.partition("[")[0]
        self._seconds[function] += report.duration
        if report.when == "call" or report.outcome != "passed":
            self._outcomes.setdefault(function, Counter())[report.outcome] += 1
        if report.failed and self.first_failure is None:
            self.first_failure = f"{report.nodeid}: {report.longreprtext.splitlines()[-1]}"
        if self._session is not None and self._report.seconds_left < END_SECONDS:
            self._session.shouldstop = "the stage has no time left"

    @property
    def run(self) -> int:
        """Return how many outcomes were counted."""
        return sum(outcomes.total() for outcomes in self._outcomes.values())

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each test function."""
        return [
            {"test": function, **{name: outcomes[name] for name in OUTCOMES}, "seconds": self._seconds[function]}
            for function, outcomes in self._outcomes.items()
        ]


def run(report: StageReport) -> None:
    """Run the tests, and report a row for each test function.

    Raises:
        FailedPreconditionError: this is no checkout with tests.
    """
    missing = [name for name in TESTS if not (ROOT / name).is_dir()]
    if missing:
        raise FailedPreconditionError(f"{missing[0]} is not in {ROOT}; run the check from a checkout of the project")
    counter = OutcomeCounter(report)
    status = pytest.main(
        [
            *("-q", "--no-header", "-p", "no:cacheprovider", f"--rootdir={ROOT}", "-c", str(ROOT / "pyproject.toml")),
            *("-m", "not slow and not exhaustive", "-k", report.settings.scale.kernel_tests),
            *(str(ROOT / name) for name in TESTS),
        ],
        plugins=[counter],
    )
    if counter.first_failure is not None:
        report.failures.append(counter.first_failure)
    elif counter.collected == 0:
        report.failures.append(f"pytest found no test (its status is {int(status)}); its output says why")
    if counter.run < counter.collected:
        report.not_run.append(f"{counter.collected - counter.run} of {counter.collected} tests: no time was left")
    report.add(counter.rows)
