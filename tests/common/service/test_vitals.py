"""A pulse that stands still fails the vitals once; work that beats and idle threads do not."""

import threading

import pytest

from spectrumkv.common.service.vitals import Vitals
from spectrumkv.common.service.watchdog import LOOKS, Watchdog

LIMIT_SECONDS = 0.2
WAIT_SECONDS = 30.0


def test_there_is_a_pulse_while_there_is_work() -> None:
    vitals = Vitals()
    assert vitals.pulse is None
    with vitals.working():
        first = vitals.pulse
        assert first is not None
        assert first[0] == threading.get_ident()
        vitals.beat()
        assert vitals.pulse != first
    assert vitals.pulse is None
    with pytest.raises(ZeroDivisionError), vitals.working():
        raise ZeroDivisionError
    assert vitals.pulse is None


def test_equal_pieces_of_work_have_another_pulse_each() -> None:
    vitals = Vitals()
    pulses = []
    for _ in range(3):
        with vitals.working():
            pulses.append(vitals.pulse)
    assert len(set(pulses)) == 3


def test_only_the_first_failure_counts() -> None:
    vitals = Vitals()
    told: list[str] = []
    vitals.on_failure(lambda: told.append("before"))
    vitals.fail("one")
    vitals.fail("two")
    vitals.on_failure(lambda: told.append("after"))
    assert vitals.failure == "one"
    assert told == ["before", "after"]


def test_work_that_hangs_is_found_and_its_stack_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("faulthandler.dump_traceback", lambda: None)
    monkeypatch.setattr("faulthandler.dump_traceback_later", lambda seconds, exit: None)
    vitals, failed, release = Vitals(), threading.Event(), threading.Event()
    vitals.on_failure(failed.set)

    def hang_here() -> None:
        with vitals.working():
            release.wait(WAIT_SECONDS)

    hanging = threading.Thread(target=hang_here)
    hanging.start()
    Watchdog(vitals, LIMIT_SECONDS).start()
    assert failed.wait(WAIT_SECONDS)
    release.set()
    hanging.join()
    assert vitals.failure is not None
    assert "no progress for 0.2 s (--stuck-after)" in vitals.failure
    assert "in hang_here" in vitals.failure


def test_idle_threads_and_work_that_beats_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    looks, failed = threading.Semaphore(0), threading.Event()
    monkeypatch.setattr("faulthandler.dump_traceback", lambda: None)
    # The watchdog postpones the end of the process once a look.
    monkeypatch.setattr("faulthandler.dump_traceback_later", lambda seconds, exit: looks.release())
    vitals = Vitals()
    Watchdog(vitals, LIMIT_SECONDS).start()
    for _ in range(2 * LOOKS):
        assert looks.acquire(timeout=WAIT_SECONDS)
    with vitals.working():
        for _ in range(2 * LOOKS):
            vitals.beat()
            assert looks.acquire(timeout=WAIT_SECONDS)
        assert vitals.failure is None
        # A watchdog ends with what it has found: this one must not outlive the test.
        vitals.on_failure(failed.set)
        assert failed.wait(WAIT_SECONDS)
