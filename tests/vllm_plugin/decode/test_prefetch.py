"""KV that is received before its request comes: it is the same, bounded, and gone when nobody wants it."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, TypeVar

import grpc
import pytest
import torch

from spectrumkv.common.errors import (
    CancelledError,
    DeadlineExceededError,
    InternalError,
    SpectrumKVError,
    UnavailableError,
)
from spectrumkv.common.kv.geometry import HeadRange
from spectrumkv.common.rpc.transfer_methods import begin_fetch
from spectrumkv.common.security import ChannelSecurity
from spectrumkv.vllm_plugin.decode.fetcher import Fetch, fetch_request, streams_needed
from spectrumkv.vllm_plugin.decode.prefetch import Prefetch, PrefetchMemory
from spectrumkv.vllm_plugin.decode.worker import ConsumerWorker
from spectrumkv.vllm_plugin.options import ConnectorOptions
from spectrumkv.vllm_plugin.scheduler.steps import ConsumerStep, Load, TransferRef
from spectrumkv.vllm_plugin.stats import Tally
from tests.vllm_plugin.fake_engine import fake_layers
from tests.vllm_plugin.transfers import (
    GEOMETRY,
    PATIENCE,
    THEIR_BLOCKS,
    TOKENS,
    ProducingRank,
    channels,
    consuming,
    fetch,
    producing,
    read,
    states,
)

ANNOUNCEMENT = TransferRef("announcement", "t", ())
ROOM = 1 << 20

Answer = TypeVar("Answer")


class Receiving:
    """A prefetch that runs on a thread of its own until the block ends."""

    def __init__(
        self,
        workers: list[ProducingRank],
        memory: PrefetchMemory,
        rank: int = 0,
        ranks: int = 1,
        patience: float = PATIENCE,
    ) -> None:
        heads = HeadRange.of_rank(rank, ranks, GEOMETRY.kv_heads)
        needed = streams_needed(heads, len(workers), GEOMETRY.kv_heads)
        self.prefetch, self.memory = Prefetch(ANNOUNCEMENT, needed, memory, patience), memory
        self._opened = channels(workers, ChannelSecurity())
        request = fetch_request(consuming(rank, ranks, fake_layers(3, heads.count, 32)), ANNOUNCEMENT)
        self._begin: Callable[[int, float], Any] = lambda one, timeout: begin_fetch(
            self._opened[one], request, timeout
        )

    def __enter__(self) -> "Receiving":
        self._pool = ThreadPoolExecutor(1)
        self.ended: Future[None] = self._pool.submit(self.prefetch.run, self._begin)
        return self

    def __exit__(self, *error: object) -> None:
        self.prefetch.cancel()
        self._pool.shutdown(wait=True)
        for channel in self._opened:
            channel.close()

    def wait_for_bytes(self, least: int = 1) -> None:
        with self.memory.changed:
            assert self.memory.changed.wait_for(lambda: self.memory.used_bytes >= least, PATIENCE)


@pytest.mark.parametrize(("producers", "consumers"), [(1, 1), (2, 1), (1, 2), (4, 2)])
def test_what_was_announced_before_prefill_is_what_a_fetch_of_its_own_gets(producers: int, consumers: int) -> None:
    with producing(producers) as workers, ExitStack() as ended:
        memories = [PrefetchMemory(ROOM) for _ in range(consumers)]
        receiving = [
            ended.enter_context(Receiving(workers, memory, rank, consumers)) for rank, memory in enumerate(memories)
        ]
        for one in workers:
            one.compute("native", 1.0, [TOKENS])
        for rank, (one, memory) in enumerate(zip(receiving, memories, strict=True)):
            one.wait_for_bytes()
            layers, tally = fetch(workers, rank, consumers, prefetch=one.prefetch)
            heads = HeadRange.of_rank(rank, consumers, GEOMETRY.kv_heads)
            assert torch.equal(read(layers), states()[:, :, :, heads.first : heads.end])
            assert tally.take()["kv_tokens_loaded_total"]["native"] == TOKENS * max(1, producers // consumers)
            one.ended.result(PATIENCE)
            assert memory.used_bytes == 0
        # A producer learns after its consumer that a stream has ended.
        poll(lambda: [one.outbox.used_bytes for one in workers], lambda used: not any(used))


def test_chunks_arrive_while_prefill_computes() -> None:
    with producing(1) as (worker,), Receiving([worker], PrefetchMemory(ROOM)) as receiving:
        computing = threading.Thread(target=worker.compute, args=("native", 1.0, [TOKENS]), kwargs={"stops_at": 2})
        computing.start()
        receiving.wait_for_bytes()
        assert not receiving.ended.done()
        worker.goes_on.set()
        computing.join(PATIENCE)
        layers, _ = fetch([worker], 0, 1, prefetch=receiving.prefetch)
    assert torch.equal(read(layers), states())


def test_memory_is_bounded_until_a_fetch_reads() -> None:
    layer_bytes = 2 * TOKENS * 4 * 32 * 4
    bound = 2 * layer_bytes + 1000
    with producing(1) as (worker,), Receiving([worker], PrefetchMemory(bound)) as receiving:
        worker.compute("native", 1.0, [TOKENS])
        receiving.wait_for_bytes(layer_bytes)
        assert receiving.memory.used_bytes <= bound
        assert not receiving.ended.done()
        layers, _ = fetch([worker], 0, 1, prefetch=receiving.prefetch)
        receiving.ended.result(PATIENCE)
    assert torch.equal(read(layers), states())


def test_one_that_was_taken_over_goes_on_where_others_hold_all_memory() -> None:
    memory = PrefetchMemory(4096)
    memory.used_bytes = 4096
    with producing(1) as (worker,), Receiving([worker], memory) as receiving:
        worker.compute("native", 1.0, [TOKENS])
        with memory.changed:
            assert memory.changed.wait_for(lambda: receiving.prefetch.take(), PATIENCE)
        layers, _ = fetch([worker], 0, 1, prefetch=receiving.prefetch)
        receiving.ended.result(PATIENCE)
    assert torch.equal(read(layers), states())
    assert memory.used_bytes == 4096


def test_one_that_is_cancelled_leaves_nothing_and_the_kv_to_a_fetch() -> None:
    with producing(1) as (worker,), Receiving([worker], PrefetchMemory(ROOM)) as receiving:
        # What prefill has sent to its end counts as fetched.
        computing = threading.Thread(target=worker.compute, args=("native", 1.0, [TOKENS]), kwargs={"stops_at": 2})
        computing.start()
        receiving.wait_for_bytes()
        assert receiving.prefetch.cancel_unless_taken()
        with pytest.raises(CancelledError):
            receiving.ended.result(PATIENCE)
        assert receiving.memory.used_bytes == 0
        worker.goes_on.set()
        computing.join(PATIENCE)
        layers, _ = fetch([worker], 0, 1, prefetch=receiving.prefetch)
        assert worker.outbox.used_bytes == 0
    assert torch.equal(read(layers), states())


def test_one_whose_fetch_is_faster_than_its_own_end_was_used(monkeypatch: pytest.MonkeyPatch) -> None:
    receive = Prefetch._receive

    def receive_and_be_fetched(prefetch: Prefetch, *arguments: Any) -> None:
        receive(prefetch, *arguments)
        assert prefetch.take()
        assert len(list(prefetch.stream(0))) > 2
        prefetch.cancel()

    monkeypatch.setattr(Prefetch, "_receive", receive_and_be_fetched)
    with producing(1) as (worker,), Receiving([worker], PrefetchMemory(ROOM)) as receiving:
        worker.compute("native", 1.0, [TOKENS])
        receiving.ended.result(PATIENCE)
        assert receiving.memory.used_bytes == 0


def test_kv_that_no_request_comes_for_is_dropped() -> None:
    with producing(1) as (worker,), Receiving([worker], PrefetchMemory(ROOM), patience=0.5) as receiving:
        worker.compute("native", 1.0, [TOKENS])
        with pytest.raises(DeadlineExceededError, match=r"no request came for the KV within 0.5 s"):
            receiving.ended.result(PATIENCE)
        assert receiving.memory.used_bytes == 0
        assert not receiving.prefetch.take()


def test_a_fetch_hears_of_the_failure_of_what_it_took_over() -> None:
    with producing(1) as (worker,), Receiving([worker], PrefetchMemory(ROOM)) as receiving:
        computing = threading.Thread(target=worker.compute, args=("native", 1.0, [TOKENS]), kwargs={"stops_at": 2})
        computing.start()
        receiving.wait_for_bytes()
        with ThreadPoolExecutor(1) as pool:
            fetching = pool.submit(fetch, [worker], 0, 1, prefetch=receiving.prefetch)
            worker.outbox.fail("t", InternalError("the coder broke"))
            with pytest.raises(SpectrumKVError, match="the coder broke"):
                fetching.result(PATIENCE)
        worker.goes_on.set()
        computing.join(PATIENCE)
        assert receiving.memory.used_bytes == 0


class Consuming:
    """A consuming worker, and what it has said so far."""

    def __init__(self, worker: ProducingRank, **options: Any) -> None:
        self.layers, self.tally = fake_layers(3, 4, 32), Tally.empty()
        self.address = (f"localhost:{worker.port}",)
        asked = ConnectorOptions.of({"fetch_timeout": PATIENCE} | options)
        self.worker = ConsumerWorker(consuming(0, 1, self.layers), asked, ChannelSecurity(), self.tally)

    def announce(self) -> None:
        self.worker.begin_step(ConsumerStep(prefetches=(TransferRef("announcement", "t", self.address),)))

    def request(self) -> None:
        self.worker.begin_step(ConsumerStep(loads=(Load("request", "t", self.address, TOKENS, 0, THEIR_BLOCKS),)))

    def wait_for_request(self) -> None:
        """Ask for the loads that ended as vLLM does, step by step."""
        ended = poll(self.worker.take_ended, lambda told: bool(told.ended))
        assert (ended.ended, ended.failed) == ({"request"}, set())

    def wait_for_outcome(self, outcome: str) -> None:
        counts = poll(self.tally.take, lambda counts: "kv_prefetches_total" in counts)
        assert counts["kv_prefetches_total"] == {outcome: 1}


def poll(ask: Callable[[], Answer], until: Callable[[Answer], bool]) -> Answer:
    """Ask until the answer is the one that no event announces."""
    waiting = threading.Event()
    for _ in range(int(PATIENCE / 0.02)):
        answer = ask()
        if until(answer):
            return answer
        waiting.wait(0.02)
    raise AssertionError(f"the last answer was {answer}")


def test_a_worker_receives_what_is_announced_and_the_request_finds_it() -> None:
    with producing(1) as (worker,):
        mine = Consuming(worker)
        mine.announce()
        worker.compute("spectral", 0.5, [TOKENS])
        mine.request()
        mine.wait_for_request()
        mine.worker.stop()
        counts = mine.tally.take()
        assert counts["kv_prefetches_total"] == {"used": 1}
        assert counts["kv_tokens_loaded_total"] == {"spectral": TOKENS}
        assert worker.outbox.used_bytes == 0


def test_what_is_dropped_gives_the_transfer_up() -> None:
    with producing(1) as (worker,):
        mine = Consuming(worker)
        mine.announce()
        worker.compute("native", 1.0, [TOKENS])
        mine.worker.begin_step(ConsumerStep(drops=("t", "another")))
        mine.wait_for_outcome("cancelled")
        poll(lambda: worker.outbox.used_bytes, lambda used: used == 0)
        mine.worker.stop()


def test_a_drop_that_comes_after_the_request_changes_nothing() -> None:
    with producing(1) as (worker,):
        mine = Consuming(worker)
        mine.announce()
        mine.request()
        mine.worker.begin_step(ConsumerStep(drops=("t",)))
        worker.compute("native", 1.0, [TOKENS])
        mine.wait_for_request()
        mine.worker.stop()
    assert torch.equal(read(mine.layers), states())


def test_a_request_whose_kv_is_here_already_drops_what_was_received() -> None:
    with producing(1) as (worker,):
        mine = Consuming(worker)
        mine.announce()
        worker.compute("native", 1.0, [TOKENS])
        mine.worker.begin_step(ConsumerStep(releases=(TransferRef("request", "t", mine.address),)))
        mine.wait_for_outcome("cancelled")
        mine.worker.stop()


@pytest.mark.parametrize(("prefetches", "outcome"), [(0, "off"), (4, "late")])
def test_an_announcement_that_is_not_wanted_changes_nothing(prefetches: int, outcome: str) -> None:
    with producing(1) as (worker,):
        mine = Consuming(worker, prefetches=prefetches)
        if outcome == "late":
            mine.request()
        mine.announce()
        mine.wait_for_outcome(outcome)
        worker.compute("native", 1.0, [TOKENS])
        if outcome == "off":
            mine.request()
        mine.wait_for_request()
        mine.worker.stop()
    assert torch.equal(read(mine.layers), states())


def test_a_worker_that_stops_ends_what_it_receives() -> None:
    with producing(1) as (worker,):
        mine = Consuming(worker)
        mine.announce()
        mine.worker.stop()
        mine.wait_for_outcome("cancelled")


def test_a_fetch_whose_connection_breaks_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    broken: list[str] = []
    run = Fetch.run

    def breaking(fetch: Fetch, opened: list[grpc.Channel]) -> None:
        if not broken:
            broken.append(fetch.load.transfer_id)
            raise UnavailableError("Stream removed (ping timeout)")
        run(fetch, opened)

    monkeypatch.setattr(Fetch, "run", breaking)
    with producing(1) as (worker,):
        mine = Consuming(worker)
        worker.compute("native", 1.0, [TOKENS])
        mine.request()
        mine.wait_for_request()
        mine.worker.stop()
    assert broken == ["t"]
    assert torch.equal(read(mine.layers), states())
