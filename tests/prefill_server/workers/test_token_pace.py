"""A worker that is slow and fails nothing gets few requests, as long as others have room."""

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from prometheus_client import CollectorRegistry

from spectrumkv.common.security import ChannelSecurity
from spectrumkv.common.service.config import Address
from spectrumkv.common.telemetry.metrics import Metrics
from spectrumkv.prefill_server.workers import token_pace
from spectrumkv.prefill_server.workers.pool import WorkerPool
from spectrumkv.prefill_server.workers.token_pace import (
    FEWEST_GAPS,
    LATEST_GAPS,
    LONGEST_TRIAL_SECONDS,
    SLOW_SECONDS,
    TRIAL_SECONDS,
    TokenPace,
    usual_pace,
)
from spectrumkv.prefill_server.workers.worker import DecodeWorker

WORKERS = 4


class Clock:
    """A monotonic clock that goes when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(token_pace.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def pace_of(seconds: float, gaps: int = LATEST_GAPS) -> TokenPace:
    pace = TokenPace()
    for _ in range(gaps):
        pace.add(seconds)
    return pace


def test_a_pace_is_known_from_enough_gaps_and_forgets_old_ones() -> None:
    pace = pace_of(0.5, FEWEST_GAPS - 1)
    assert pace.seconds is None
    pace.add(0.01)
    assert pace.seconds == 0.5
    for _ in range(LATEST_GAPS // 2 + 1):
        pace.add(0.02)
    assert pace.seconds == 0.02


@pytest.mark.parametrize(
    ("paces", "slow"),
    [
        ([0.02], [False]),
        ([0.02, None], [False, False]),
        ([0.02, 0.2], [False, True]),
        ([0.02, 0.05], [False, False]),
        ([0.02, 0.02, 0.2, None], [False, False, True, False]),
        ([0.02, 0.03, 0.2, 0.2], [False, False, True, True]),
        # One that has nothing to do is no measure of the others.
        ([0.005, 0.05, 0.06, 0.05], [False, False, False, False]),
        ([0.0001, 0.0001 + SLOW_SECONDS / 2], [False, False]),
    ],
)
def test_a_worker_is_slow_by_what_is_usual(paces: list[float | None], slow: list[bool]) -> None:
    known = [TokenPace() if seconds is None else pace_of(seconds) for seconds in paces]
    usual = usual_pace(known)
    assert [pace.is_slow(usual) for pace in known] == slow


def test_a_slow_worker_gets_a_request_now_and_then(clock: Clock) -> None:
    pace = pace_of(0.2)
    assert pace.is_slow(0.02)
    for pause in (TRIAL_SECONDS, TRIAL_SECONDS, 2 * TRIAL_SECONDS, 4 * TRIAL_SECONDS):
        clock.now += pause - 0.1
        assert pace.is_slow(0.02)
        clock.now += 0.1
        assert not pace.is_slow(0.02)
        pace.begin()
        assert pace.is_slow(0.02)
    for _ in range(20):
        pace.begin()
    clock.now += LONGEST_TRIAL_SECONDS
    assert not pace.is_slow(0.02)
    # One that was fast in between is given the shortest pause again.
    assert not pace.is_slow(0.1)
    assert pace.is_slow(0.02)
    clock.now += TRIAL_SECONDS
    assert not pace.is_slow(0.02)


@contextlib.contextmanager
def pool_of(slots: int) -> Iterator[WorkerPool]:
    """Workers that nobody follows, and that answer as far as anybody knows."""
    addresses = [Address("127.0.0.1", port) for port in range(1, WORKERS + 1)]
    pool = WorkerPool(addresses, ChannelSecurity(), Metrics(CollectorRegistry()))
    for worker in pool._roster.workers:
        worker._answers, worker._slots = True, slots
    try:
        yield pool
    finally:
        pool.close()


def test_room_comes_before_speed_and_speed_before_more_room() -> None:
    with pool_of(slots=100) as pool:
        slow, fast, full, _ = pool._roster.workers
        for worker in pool._roster.workers:
            for _ in range(LATEST_GAPS):
                worker.pace.add(0.2 if worker is slow else 0.02)
        with fast.holding(60), full.holding(90):
            assert pool.ranked(20)[-2:] == [slow, full]
            assert pool.ranked(20)[1] is fast


# Of the simulation: seconds of a token alone and more for each request beside it, tokens and slots of a request.
TOKEN_SECONDS, MORE_SECONDS, TOKENS, SLOTS = 0.02, 0.002, 50, 100
ROOM = 16 * SLOTS
STEP_SECONDS, SIMULATED_SECONDS = 0.005, 60.0
# Good is an answer that takes a quarter longer, at most, than from a sound worker that is full.
GOOD_SECONDS = 1.25 * TOKENS * (TOKEN_SECONDS + 16 * MORE_SECONDS)


@dataclass
class Running:
    """A request on its worker."""

    worker: DecodeWorker
    held: contextlib.ExitStack
    begun_at: float
    token_at: float
    tokens: int = 0


@dataclass
class Fleet:
    """A fleet in made-up time: what prefill would do, and workers whose tokens take as long as they are told."""

    pool: WorkerPool
    clock: Clock
    times: dict[DecodeWorker, float]
    running: list[Running] = field(default_factory=list)
    good: int = 0
    late: int = 0
    refused: int = 0

    def come(self) -> None:
        worker = self.pool.ranked(SLOTS)[0]
        if worker.free_slots < SLOTS:
            self.refused += 1
            return
        held = contextlib.ExitStack()
        held.enter_context(worker.holding(SLOTS))
        worker.pace.begin()
        self.running.append(Running(worker, held, self.clock.now, self.clock.now))

    def go_on(self) -> None:
        beside = {worker: sum(one.worker is worker for one in self.running) for worker in self.times}
        for one in list(self.running):
            gap = self.times[one.worker] * (TOKEN_SECONDS + beside[one.worker] * MORE_SECONDS)
            if self.clock.now - one.token_at < gap:
                continue
            one.worker.pace.add(self.clock.now - one.token_at)
            one.token_at = self.clock.now
            one.tokens += 1
            if one.tokens == TOKENS:
                one.held.close()
                self.running.remove(one)
                in_time = self.clock.now - one.begun_at <= GOOD_SECONDS
                self.good, self.late = self.good + in_time, self.late + (not in_time)


def simulated(clock: Clock, times: tuple[float, ...], rate: float) -> Fleet:
    arrivals = random.Random(0)
    with pool_of(ROOM) as pool:
        fleet = Fleet(pool, clock, dict(zip(pool._roster.workers, times, strict=True)))
        end, due = clock.now + SIMULATED_SECONDS, clock.now
        while clock.now < end:
            while due <= clock.now:
                fleet.come()
                due += arrivals.expovariate(rate)
            fleet.go_on()
            clock.now += STEP_SECONDS
    return fleet


@pytest.mark.parametrize("rate", [6.0, 12.0])
def test_a_fleet_with_one_slow_worker_keeps_its_goodput(clock: Clock, rate: float) -> None:
    """Ten times slower, at loads that the other three can bear."""
    healthy = simulated(clock, (1.0, 1.0, 1.0, 1.0), rate)
    harmed = simulated(clock, (10.0, 1.0, 1.0, 1.0), rate)
    assert healthy.late == healthy.refused == harmed.refused == 0
    assert harmed.late <= 10
    assert harmed.good >= 0.95 * healthy.good


def test_a_worker_that_recovers_is_used_again(clock: Clock) -> None:
    with pool_of(ROOM) as pool:
        first = pool._roster.workers[0]
        fleet = Fleet(pool, clock, dict.fromkeys(pool._roster.workers, 1.0) | {first: 10.0})
        arrivals, due, sent = random.Random(1), clock.now, [0, 0]
        recovers, end = clock.now + 30.0, clock.now + 60.0
        while clock.now < end:
            fleet.times[first] = 10.0 if clock.now < recovers else 1.0
            while due <= clock.now:
                before = first.free_slots
                fleet.come()
                sent[clock.now > recovers + 2 * TRIAL_SECONDS] += first.free_slots < before
                due += arrivals.expovariate(12.0)
            fleet.go_on()
            clock.now += STEP_SECONDS
    assert sent[0] < 0.06 * 40 * 12
    assert sent[1] > 0.15 * 20 * 12
