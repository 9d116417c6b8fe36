"""The outbox: bounded in bytes and in time, each transfer handed out as often as it was made for."""

import threading
from collections.abc import Iterator

import pytest

from spectrumkv.common.errors import InternalError, NotFoundError, ResourceExhaustedError
from spectrumkv.vllm_plugin.prefill import outbox as outbox_module
from spectrumkv.vllm_plugin.prefill.outbox import Outbox

MEMORY, TIME_TO_LIVE, PATIENCE = 1000, 60.0, 5.0


class Clock:
    """Monotonic seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def outbox(clock: Clock | None = None, expired: list[int] | None = None) -> Outbox:
    on_expired = (lambda: expired.append(1)) if expired is not None else (lambda: None)
    return Outbox(MEMORY, TIME_TO_LIVE, on_expired, clock or Clock())


def filled(box: Outbox, fetches: int = 1, transfer_id: str = "t") -> None:
    box.open(transfer_id, 400, fetches)
    box.add(transfer_id, b"header")
    box.add(transfer_id, b"chunk")
    box.finish(transfer_id, b"end")


def fetch(box: Outbox, request_id: str = "r", rank: int = 0, ranks: int = 1, seconds: float = 0.0) -> Iterator[bytes]:
    return box.fetch("t", request_id, rank, ranks, lambda: False, seconds)


def test_a_transfer_is_handed_out_once_and_leaves_nothing() -> None:
    box = outbox()
    filled(box)
    assert box.used_bytes == len(b"headerchunkend")
    assert list(fetch(box)) == [b"header", b"chunk", b"end"]
    assert box.used_bytes == 0
    with pytest.raises(NotFoundError, match="fetched, given up or dropped before"):
        list(fetch(box, seconds=PATIENCE))


def test_a_fetch_that_comes_first_gets_messages_as_they_are_made() -> None:
    box, got = outbox(), list[bytes]()
    begun = threading.Event()

    def read() -> None:
        for message in fetch(box, seconds=PATIENCE):
            got.append(message)
            begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    box.open("t", 400, 1)
    box.add("t", b"header")
    assert begun.wait(PATIENCE)
    box.finish("t", b"end")
    reader.join(PATIENCE)
    assert got == [b"header", b"end"]
    assert box.used_bytes == 0


def test_a_transfer_that_does_not_come_is_refused() -> None:
    with pytest.raises(NotFoundError, match="did not begin"):
        list(fetch(outbox()))


def test_fetches_that_come_first_leave_threads_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "MOST_EARLY", 1)
    box, got = outbox(), list[bytes]()
    early = threading.Thread(target=lambda: got.extend(box.fetch("early", "r", 0, 1, lambda: False, PATIENCE)))
    early.start()
    filled(box)
    with box._changed:
        assert box._changed.wait_for(lambda: box._early == 1, PATIENCE)
    with pytest.raises(ResourceExhaustedError, match="1 fetches wait for transfers that have not begun"):
        list(box.fetch("another", "r", 0, 1, lambda: False, PATIENCE))
    assert len(list(fetch(box))) == 3
    filled(box, transfer_id="early")
    early.join(PATIENCE)
    assert len(got) == 3


def test_each_completion_fetches_for_itself_and_no_more() -> None:
    box = outbox()
    filled(box, fetches=2)
    assert len(list(fetch(box, "a"))) == 3
    with pytest.raises(NotFoundError):
        list(fetch(box, "a"))
    assert len(list(fetch(box, "b"))) == 3
    assert box.used_bytes == 0


def test_all_ranks_of_a_consumer_fetch_before_a_transfer_is_over() -> None:
    box = outbox()
    filled(box)
    list(fetch(box, rank=0, ranks=2))
    assert box.used_bytes > 0
    list(fetch(box, rank=1, ranks=2))
    assert box.used_bytes == 0


def test_a_fetch_that_breaks_off_may_be_repeated() -> None:
    box = outbox()
    filled(box)
    broken = fetch(box)
    next(broken)
    broken.close()  # type: ignore[attr-defined]
    assert len(list(fetch(box))) == 3


def test_giving_up_counts_once_for_a_request() -> None:
    box = outbox()
    filled(box, fetches=2)
    for _ in range(3):
        box.release("t", "a")
    assert len(list(fetch(box, "b"))) == 3
    assert box.used_bytes == 0
    box.release("t", "b")
    box.release("unknown", "b")


def test_what_nobody_fetches_is_dropped_and_counted() -> None:
    clock, expired = Clock(), list[int]()
    box = outbox(clock, expired)
    filled(box)
    clock.now = TIME_TO_LIVE - 1
    box.expire()
    assert box.used_bytes > 0
    clock.now = TIME_TO_LIVE
    box.expire()
    assert (box.used_bytes, expired) == (0, [1])
    with pytest.raises(NotFoundError):
        list(fetch(box, seconds=PATIENCE))


def test_what_is_being_fetched_is_not_dropped() -> None:
    clock = Clock()
    box = outbox(clock)
    filled(box)
    reading = fetch(box)
    next(reading)
    clock.now = 2 * TIME_TO_LIVE
    box.expire()
    assert list(reading) == [b"chunk", b"end"]


def test_a_full_outbox_refuses_and_tells_whoever_fetches() -> None:
    box = outbox()
    box.open("other", 700, 1)
    with pytest.raises(ResourceExhaustedError, match="raise outbox_memory"):
        box.open("t", 400, 1)
    with pytest.raises(ResourceExhaustedError):
        list(fetch(box))
    assert box.used_bytes == 700
    box.discard("other")
    assert box.used_bytes == 0


def test_a_transfer_that_cannot_be_coded_says_why_and_holds_nothing() -> None:
    box = outbox()
    box.open("t", 400, 1)
    box.fail("t", InternalError("layer 3 holds no numbers"))
    assert (box.used_bytes, box.holds("t")) == (0, False)
    with pytest.raises(InternalError, match="layer 3"):
        list(fetch(box))


def test_a_caller_who_goes_is_not_waited_for() -> None:
    box, gone = outbox(), threading.Event()
    refused = list[BaseException]()

    def read() -> None:
        try:
            list(box.fetch("t", "r", 0, 1, gone.is_set, 60.0))
        except NotFoundError as error:
            refused.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    gone.set()
    while reader.is_alive():
        box.wake()
        reader.join(0.01)
    assert len(refused) == 1


def test_a_prompt_that_is_computed_anew_takes_the_place_of_its_first_try() -> None:
    box = outbox()
    box.open("t", 400, 1)
    box.add("t", b"old")
    filled(box)
    assert list(fetch(box)) == [b"header", b"chunk", b"end"]
    assert box.used_bytes == 0
