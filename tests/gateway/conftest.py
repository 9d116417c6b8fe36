from collections.abc import Iterator

import pytest

from tests.client.fake_servers import FakePrefill, prefill_server, serving
from tests.gateway.running import RunningGateway, running_gateway


@pytest.fixture
def prefill() -> Iterator[FakePrefill]:
    """A prefill service that answers as it is told."""
    service = FakePrefill(tool_call_format="hermes")
    with serving(prefill_server(service, threads=64)) as service.address:
        yield service


@pytest.fixture
def gateway(prefill: FakePrefill) -> Iterator[RunningGateway]:
    with running_gateway(prefill.address) as running:
        yield running
