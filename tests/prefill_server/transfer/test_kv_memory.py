"""Prompts share the memory for KV that has not left yet in the order in which they come."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch

from spectrumkv.common.errors import CancelledError, FailedPreconditionError, InvalidArgumentError
from spectrumkv.common.rpc.scope import RpcScope
from spectrumkv.common.service import cgroup, machine
from spectrumkv.prefill_server.transfer.kv_memory import KvMemory, KvReservation, kv_memory_bytes
from tests.waiting import until


class Unended(RpcScope):
    """Of a client who waits."""

    def __init__(self) -> None:
        pass

    def on_end(self, callback: Callable[[], object]) -> None:
        pass

    def check(self) -> None:
        pass


def reservation(memory: KvMemory, size: int) -> KvReservation:
    return memory.reservation(size, 1, Unended())


Asked = tuple[KvReservation, "Future[bool]"]


def queued(threads: ThreadPoolExecutor, memory: KvMemory, sizes: Sequence[int]) -> list[Asked]:
    """Ask for memory in this order, each on a thread of its own."""
    found: list[Asked] = []

    def all_have_asked() -> bool:
        return memory.waiting == sum(not one.granted for one, _ in found)

    for size in sizes:
        one = reservation(memory, size)
        found.append((one, threads.submit(memory.obtain, one)))
        until(all_have_asked)
    return found


def test_what_fits_is_held_at_once_and_the_rest_waits_in_order() -> None:
    memory = KvMemory(10)
    with ThreadPoolExecutor(4) as threads:
        found = queued(threads, memory, [6, 4, 5, 1])
        assert [one.granted for one, _ in found] == [True, True, False, False]
        # One byte would fit, but five have waited for longer.
        found[1][0].end()
        assert [one.granted for one, _ in found] == [True, False, False, False]
        found[0][0].end()
        assert all(future.result(10) for _, future in found[2:])
        for one, _ in found:
            one.end()
    assert memory.waiting == 0


def test_a_prompt_larger_than_the_memory_is_refused() -> None:
    memory = KvMemory(10)
    assert memory.reservation(3, 3, Unended()).needed_bytes == 9
    with pytest.raises(InvalidArgumentError) as caught:
        memory.reservation(4, 3, Unended())
    assert caught.value.message == (
        "the prompt has 4 tokens, whose KV takes 12 bytes; this service has 10 bytes for KV (--prefill-kv-memory): "
        "send at most 3 tokens"
    )


def test_a_request_that_ends_while_it_waits_holds_nothing() -> None:
    memory = KvMemory(10)
    with ThreadPoolExecutor(3) as threads:
        (first, _), (second, gone), (third, waits) = queued(threads, memory, [6, 10, 4])
        second.end()
        assert gone.result(10) is False
        assert waits.result(10) is True
        for one in (first, second, third, first):
            one.end()
    assert not second.granted
    assert memory.obtain(reservation(memory, 10))


def test_a_request_that_is_sent_again_obtains_its_bytes_again() -> None:
    memory = KvMemory(10)
    with ThreadPoolExecutor(2) as threads:
        (first, _), (second, waits) = queued(threads, memory, [6, 10])
        # It holds its bytes already.
        assert memory.obtain(first)
        first.release()
        first.release()
        assert waits.result(10) is True
        again = threads.submit(memory.obtain, first)
        until(lambda: memory.waiting == 1)
        second.release()
        assert again.result(10) is True
        first.end()
    assert memory.obtain(first) is False
    assert memory.obtain(reservation(memory, 10))


def test_a_request_that_ended_before_is_not_served() -> None:
    memory = KvMemory(10)
    one = reservation(memory, 4)
    one.end()
    assert memory.obtain(one) is False
    with pytest.raises(CancelledError, match="while it waited for memory"):
        one.wait()


def test_many_threads_never_hold_more_than_there_is() -> None:
    memory, lock, held, most = KvMemory(100), threading.Lock(), 0, 0

    def use(size: int) -> None:
        nonlocal held, most
        one = reservation(memory, size)
        assert memory.obtain(one)
        with lock:
            held += size
            most = max(most, held)
        with lock:
            held -= size
        one.end()

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(use, [7, 30, 55, 100, 1] * 100))
    assert 0 < most <= 100


@pytest.mark.parametrize(
    ("whole", "beside_the_model", "asked", "expected"),
    [
        (8 << 30, 6 << 30, None, 4 << 30),
        (8 << 30, 3 << 30, None, 3 << 30),
        (8 << 30, 3 << 30, 1 << 30, 1 << 30),
        (None, None, None, 4 << 30),
        (None, None, 1 << 40, 1 << 40),
    ],
)
def test_the_default_is_half_of_the_memory_and_leaves_the_model_its_own(
    monkeypatch: pytest.MonkeyPatch, whole: int | None, beside_the_model: int | None, asked: int | None, expected: int
) -> None:
    monkeypatch.setattr(cgroup, "memory_bytes", lambda: whole)
    monkeypatch.setattr(machine, "bytes_left", lambda: beside_the_model)
    assert kv_memory_bytes(asked, torch.device("cpu")) == expected


@pytest.mark.parametrize(("there", "asked"), [(1000, 1001), (0, None)])
def test_more_memory_than_there_is_beside_the_model_is_refused(
    monkeypatch: pytest.MonkeyPatch, there: int, asked: int | None
) -> None:
    monkeypatch.setattr(cgroup, "memory_bytes", lambda: 5000)
    monkeypatch.setattr(machine, "bytes_left", lambda: there)
    with pytest.raises(FailedPreconditionError, match=rf"--prefill-kv-memory is .* has 5000, .* leave {there}; "):
        kv_memory_bytes(asked, torch.device("cpu"))
