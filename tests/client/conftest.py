from collections.abc import Iterator

import pytest

from tests.client.fake_servers import FakePrefill, decode_server, prefill_server, serving


@pytest.fixture
def prefill() -> Iterator[FakePrefill]:
    service = FakePrefill()
    with serving(prefill_server(service)) as service.address:
        yield service


@pytest.fixture
def decode_address() -> Iterator[str]:
    with serving(decode_server()) as address:
        yield address
