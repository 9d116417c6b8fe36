from collections.abc import Iterator

import pytest

from tests.services.pair import Pair, running_pair
from tests.tiny_models import tiny_model


@pytest.fixture(scope="package")
def pair() -> Iterator[Pair]:
    """Our own services."""
    with running_pair(tiny_model("llama")) as running:
        yield running
