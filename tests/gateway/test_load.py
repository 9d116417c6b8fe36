"""Many streams at once, and many requests one after another; `load.py` says what they took."""

import asyncio

import pytest

from tests.gateway import load


@pytest.mark.slow
def test_two_hundred_streams_at_once_come_whole() -> None:
    with load.started("tests.gateway.paced_prefill", load.PREFILL, "8", "0.1", ready="serving"), load.gateway():
        http, direct = asyncio.run(load.compare(200, 8, 0.1, rounds=1))
    assert (http.errors, direct.errors) == (0, 0)
    assert len(http.first) == len(direct.first) == 400


@pytest.mark.slow
def test_memory_is_flat_over_many_requests_of_which_a_fifth_is_left() -> None:
    with (
        load.started("tests.gateway.paced_prefill", load.PREFILL, "4", "0.001", ready="serving"),
        load.gateway() as gateway,
    ):
        memory = asyncio.run(load.many(3000, gateway.pid))
    # Python's own arenas settle in the first tenths.
    assert memory[-1] - memory[4] < 3.0, memory
