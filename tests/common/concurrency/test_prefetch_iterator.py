"""A stage on a thread of its own hands over what it makes, in order, and never more than it may."""

import threading
from collections.abc import Iterator

import pytest

from spectrumkv.common.concurrency.prefetch_iterator import PrefetchIterator
from spectrumkv.common.errors import InternalError

NAME = "test-stage"


def stages() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == NAME]


def test_items_come_in_order_and_no_more_than_the_depth_are_made_ahead() -> None:
    made = threading.Semaphore(0)

    def items() -> Iterator[int]:
        for item in range(100):
            made.release()
            yield item

    taken = iter(PrefetchIterator(items(), depth=3, name=NAME))
    assert next(taken) == 0
    # The one that was taken, three that wait, and one whose maker waits for room.
    for _ in range(5):
        assert made.acquire(timeout=10)
    assert not made.acquire(timeout=0.05)
    assert list(taken) == list(range(1, 100))


def test_what_the_maker_raises_comes_after_what_it_made() -> None:
    def items() -> Iterator[str]:
        yield "made"
        raise LookupError("no more")

    taken = iter(PrefetchIterator(items(), depth=8, name=NAME))
    assert next(taken) == "made"
    with pytest.raises(LookupError, match="no more"):
        next(taken)


def test_a_maker_that_is_ended_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    monkeypatch.setattr(threading, "excepthook", lambda _: ended.set())

    def items() -> Iterator[str]:
        yield "made"
        raise SystemExit

    taken = iter(PrefetchIterator(items(), depth=8, name=NAME))
    assert next(taken) == "made"
    with pytest.raises(InternalError, match="ended"):
        next(taken)
    assert ended.wait(10)


def test_closing_ends_the_taker_and_the_maker() -> None:
    forever = iter(int, 1)
    ahead = PrefetchIterator(forever, depth=2, name=NAME)
    taken = iter(ahead)
    assert next(taken) == 0
    (maker,) = stages()
    ahead.close()
    assert list(taken) == []
    maker.join(timeout=10)
    assert not maker.is_alive()
