"""Every fault in every phase, on real processes, in plaintext and over mutual TLS with bearer tokens.

The run prints how many faults it injected. One that is not exhaustive injects each once, in one of the two ways
(`pytest_collection_modifyitems` in conftest.py).
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.faults.incubator import Incubator
from tests.faults.matrix.kinds import PROMPT_FAULTS, SILENT_FAULTS, Fault
from tests.faults.matrix.phases import PHASES
from tests.faults.matrix.side_by_side import LANES, Lane, SideBySide, running_lanes

# Fixtures have bounds of their own; the first one may wait for a compiler.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300, func_only=True)]


@pytest.fixture(scope="module", params=[False, True], ids=["plaintext", "mutual-tls"])
def secured(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def lanes(secured: bool, tmp_path_factory: pytest.TempPathFactory, incubator: Incubator) -> Iterator[list[Lane]]:
    with running_lanes(tmp_path_factory.mktemp("faults"), incubator, LANES, secured) as running:
        yield running


@pytest.fixture(scope="module")
def side_by_side(request: pytest.FixtureRequest, secured: bool, lanes: list[Lane]) -> Iterator[SideBySide]:
    """All silent faults that are selected, under way."""
    selected = [
        item.callspec.params
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.originalname == "test_silence"
    ]
    cells = [(params["fault"], params["phase"]) for params in selected if params["secured"] == secured]
    running = SideBySide(lanes, cells)
    yield running
    running.close()


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("fault", SILENT_FAULTS, ids=lambda fault: fault.name)
def test_silence(
    side_by_side: SideBySide, fault: Fault, phase: str, record_property: Callable[[str, Any], None]
) -> None:
    record_property("fault", fault.name)
    record_property("told_after", side_by_side.told_after(fault, phase))


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("fault", PROMPT_FAULTS, ids=lambda fault: fault.name)
def test_fault(lanes: list[Lane], fault: Fault, phase: str, record_property: Callable[[str, Any], None]) -> None:
    record_property("fault", fault.name)
    record_property("told_after", lanes[0].inject(fault, phase))
