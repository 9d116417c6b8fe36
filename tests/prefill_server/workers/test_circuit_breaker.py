"""When a worker is left alone, and for how long."""

import pytest

from spectrumkv.prefill_server.workers import circuit_breaker
from spectrumkv.prefill_server.workers.circuit_breaker import (
    EJECTION_SECONDS,
    FAILURES_OF_LATEST,
    FAILURES_TO_EJECT,
    LONGEST_EJECTION_SECONDS,
    CircuitBreaker,
)


class Clock:
    """A monotonic clock that goes when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(circuit_breaker.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def eject(breaker: CircuitBreaker) -> float:
    for _ in range(FAILURES_TO_EJECT):
        assert not breaker.ejected
        seconds = breaker.failed()
    assert breaker.ejected
    assert seconds is not None
    return seconds


def test_a_success_between_failures_starts_the_count_anew(clock: Clock) -> None:
    breaker = CircuitBreaker()
    for _ in range(5):
        for _ in range(FAILURES_TO_EJECT - 1):
            assert breaker.failed() is None
        for _ in range(FAILURES_TO_EJECT):
            breaker.succeeded()
    assert not breaker.ejected


def test_half_of_the_latest_requests_are_enough(clock: Clock) -> None:
    breaker = CircuitBreaker()
    for _ in range(FAILURES_OF_LATEST - 1):
        breaker.succeeded()
        assert breaker.failed() is None
    assert breaker.failed() == EJECTION_SECONDS
    assert breaker.ejected
    # A trial that fails ejects again, though no three in a row have failed.
    clock.now += EJECTION_SECONDS
    assert breaker.begin()
    assert breaker.failed() == 2 * EJECTION_SECONDS


def test_after_an_ejection_one_request_is_the_trial(clock: Clock) -> None:
    breaker = CircuitBreaker()
    assert eject(breaker) == EJECTION_SECONDS
    assert not breaker.begin()
    clock.now += EJECTION_SECONDS
    assert not breaker.ejected
    assert breaker.begin()
    # Others keep away while the trial runs.
    assert breaker.ejected
    assert not breaker.begin()
    breaker.generated()
    assert not breaker.ejected


def test_each_failed_trial_doubles_the_ejection_up_to_the_longest(clock: Clock) -> None:
    breaker = CircuitBreaker()
    seconds = eject(breaker)
    for number in range(1, 10):
        clock.now += seconds
        assert breaker.begin()
        longer = breaker.failed()
        assert longer == min(EJECTION_SECONDS * 2**number, LONGEST_EJECTION_SECONDS)
        seconds = longer
    clock.now += seconds
    assert breaker.begin()
    breaker.generated()
    breaker.succeeded()
    assert eject(breaker) == EJECTION_SECONDS


def test_a_trial_that_generates_and_then_fails_ejects_at_once(clock: Clock) -> None:
    breaker = CircuitBreaker()
    clock.now += eject(breaker)
    assert breaker.begin()
    breaker.generated()
    assert breaker.failed() == 2 * EJECTION_SECONDS


def test_a_trial_that_says_nothing_leaves_the_next_one_to_another_request(clock: Clock) -> None:
    breaker = CircuitBreaker()
    clock.now += eject(breaker)
    assert breaker.begin()
    breaker.abandon_trial()
    assert not breaker.ejected
    assert breaker.begin()


def test_failures_of_requests_that_still_run_do_not_lengthen_an_ejection(clock: Clock) -> None:
    breaker = CircuitBreaker()
    seconds = eject(breaker)
    assert [breaker.failed() for _ in range(20)] == [None] * 20
    clock.now += seconds
    assert not breaker.ejected
