"""Every fault in every phase, on real processes. The run prints how many faults it injected."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.faults.deployment import Deployment, running_deployment
from tests.faults.kinds import FAULTS, Fault
from tests.faults.matrix import inject, reference_of
from tests.faults.phases import PHASES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with running_deployment(tmp_path_factory.mktemp("faults")) as running:
        yield running


@pytest.fixture(scope="module")
def reference(deployment: Deployment) -> list[int]:
    return reference_of(deployment)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault(
    deployment: Deployment,
    reference: list[int],
    fault: Fault,
    phase: str,
    record_property: Callable[[str, Any], None],
) -> None:
    inject(deployment, reference, fault, phase, record_property)
