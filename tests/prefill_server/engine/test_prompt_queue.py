import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectrumkv.prefill_server.engine.prompt_queue import PromptQueue


def test_the_shortest_goes_first_and_equals_in_order_of_arrival() -> None:
    queue: PromptQueue[str] = PromptQueue()
    for name, tokens in (("long", 900), ("first short", 10), ("middle", 50), ("second short", 10)):
        queue.put(name, tokens)
    assert [queue.take() for _ in range(5)] == ["first short", "second short", "middle", "long", None]


def test_a_long_prompt_is_passed_over_so_often_and_no_more() -> None:
    queue: PromptQueue[str] = PromptQueue(limit=3)
    queue.put("long", 900)
    taken: list[str | None] = []
    for number in range(6):
        # Short ones keep coming.
        queue.put(f"short {number}", 10)
        taken.append(queue.take())
    assert taken == ["short 0", "short 1", "short 2", "long", "short 3", "short 4"]


def test_what_nobody_waits_for_is_taken_out() -> None:
    queue: PromptQueue[str] = PromptQueue()
    gone = queue.put("gone", 1)
    queue.put("here", 2)
    queue.remove(gone)
    queue.remove(gone)
    assert len(queue) == 1
    assert queue.take() == "here"


@pytest.mark.parametrize("limit", [0, 1, 4])
@given(seed=st.integers(0, 1 << 30))
def test_nobody_waits_for_more_than_those_before_and_the_limit_of_later_ones(limit: int, seed: int) -> None:
    chance = random.Random(seed)
    queue: PromptQueue[int] = PromptQueue(limit)
    taken: list[int] = []
    arrived = 0
    for _ in range(60):
        if chance.random() < 0.6:
            queue.put(arrived, chance.randint(1, 5))
            arrived += 1
        elif (item := queue.take()) is not None:
            taken.append(item)
    while (item := queue.take()) is not None:
        taken.append(item)
    assert sorted(taken) == list(range(arrived))
    for place, item in enumerate(taken):
        assert sum(earlier > item for earlier in taken[:place]) <= limit


def test_what_is_put_back_has_its_old_place() -> None:
    queue: PromptQueue[str] = PromptQueue(limit=2)
    arrival = queue.put("long", 900)
    assert queue.take() == "long"
    queue.put("as long", 900)
    shorts = [f"short {number}" for number in range(4)]
    for short in shorts:
        queue.put(short, 10)
    assert queue.put("long", 900, arrival) == arrival
    # Two may go before it, and it goes before whoever came after it.
    assert [queue.take() for _ in range(6)] == [*shorts[:2], "long", "as long", *shorts[2:]]
