"""At what pace KV is taken in."""

import threading
import time
from collections.abc import Iterator

import pytest

from spectrumkv.common.kv.wire import KvChunk
from spectrumkv.common.rpc.decode_stream import Request
from spectrumkv.decode_server.receiver import SHARE_OF_A_CORE, throttled
from spectrumkv.v1 import decode_pb2

WORK_SECONDS = 0.01


def work() -> None:
    until = time.thread_time() + WORK_SECONDS
    while time.thread_time() < until:
        pass


def read() -> Iterator[Request]:
    """Begin, three chunks and End, each of which takes some work to read."""
    begin = decode_pb2.DecodeRequest(begin=decode_pb2.Begin())
    chunk = KvChunk(0, 0, (b"",))
    end = decode_pb2.DecodeRequest(end=decode_pb2.End())
    for message in (begin, chunk, chunk, chunk, end):
        work()
        yield message


def test_chunks_wait_for_what_was_worked_and_nothing_else_does() -> None:
    waits: list[float] = []
    waited_before: list[int] = []
    for _ in throttled(read(), waits.append):
        waited_before.append(len(waits))
        work()
    # Begin and its reading are worked off before the first chunk; End comes as soon as it can.
    assert waited_before == [0, 1, 2, 3, 3]
    least = 2 * WORK_SECONDS * (1 / SHARE_OF_A_CORE - 1)
    assert waits == pytest.approx([least] * 3, rel=0.5)


def test_time_spent_waiting_is_no_work() -> None:
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        threading.Event().wait(seconds)

    for _ in throttled(read(), wait):
        pass
    assert waits == pytest.approx([WORK_SECONDS * (1 / SHARE_OF_A_CORE - 1)] * 3, rel=0.5)
