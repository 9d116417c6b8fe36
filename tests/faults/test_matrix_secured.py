"""The same over mutual TLS and bearer tokens on every channel, in the two phases in which most is under way."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.faults.deployment import Deployment, running_deployment
from tests.faults.kinds import FAULTS, Fault
from tests.faults.matrix import inject, reference_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with running_deployment(tmp_path_factory.mktemp("faults"), secured=True) as running:
        yield running


@pytest.fixture(scope="module")
def reference(deployment: Deployment) -> list[int]:
    return reference_of(deployment)


@pytest.mark.parametrize("phase", ["mid-transfer", "decoding"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault(
    deployment: Deployment,
    reference: list[int],
    fault: Fault,
    phase: str,
    record_property: Callable[[str, Any], None],
) -> None:
    inject(deployment, reference, fault, phase, record_property)
