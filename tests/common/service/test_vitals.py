"""A pulse that stands still fails the vitals once; work that beats and idle threads do not."""

import subprocess
import sys
import threading

import pytest

from spectrumkv.common.service.vitals import Vitals
from spectrumkv.common.service.watchdog import LOOKS, Watchdog

LIMIT_SECONDS = 0.2
WAIT_SECONDS = 30.0


def test_there_is_a_pulse_while_there_is_work() -> None:
    vitals = Vitals()
    assert not vitals.pulses
    with vitals.working():
        first = vitals.pulses
        assert first.keys() == {threading.get_ident()}
        vitals.beat()
        assert vitals.pulses != first
    assert not vitals.pulses
    with pytest.raises(ZeroDivisionError), vitals.working():
        raise ZeroDivisionError
    assert not vitals.pulses


def test_equal_pieces_of_work_have_another_pulse_each() -> None:
    vitals = Vitals()
    beats = set()
    for _ in range(3):
        with vitals.working():
            beats |= set(vitals.pulses.values())
    assert len(beats) == 3


def test_only_the_first_failure_counts() -> None:
    vitals = Vitals()
    told: list[str] = []
    vitals.on_failure(lambda: told.append("before"))
    vitals.fail("one")
    vitals.fail("two")
    vitals.on_failure(lambda: told.append("after"))
    assert vitals.failure == "one"
    assert told == ["before", "after"]


def test_work_that_hangs_is_found_beside_work_that_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("faulthandler.dump_traceback_later", lambda seconds, **options: None)
    vitals, failed, release = Vitals(), threading.Event(), threading.Event()
    vitals.on_failure(failed.set)

    def hang_here() -> None:
        with vitals.working():
            release.wait(WAIT_SECONDS)

    hanging = threading.Thread(target=hang_here)
    hanging.start()
    with vitals.working():
        Watchdog(vitals, LIMIT_SECONDS).start()
        while not failed.wait(LIMIT_SECONDS / LOOKS / 2):
            vitals.beat()
    release.set()
    hanging.join()
    assert vitals.failure is not None
    assert "no progress for 0.2 s (--stuck-after)" in vitals.failure
    assert "in hang_here" in vitals.failure


def test_idle_threads_and_work_that_beats_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    looks, failed = threading.Semaphore(0), threading.Event()
    # The watchdog postpones the end of the process once a look.
    monkeypatch.setattr("faulthandler.dump_traceback_later", lambda seconds, **options: looks.release())
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


HOLDS_THE_INTERPRETER = """
import ctypes, os
from spectrumkv.common.service.vitals import Vitals
from spectrumkv.common.service.watchdog import Watchdog
Watchdog(Vitals(), 0.2).start()
os.set_blocking(2, False)
try:
    while True:
        os.write(2, b"." * 4096)
except BlockingIOError:
    os.set_blocking(2, True)
while True:
    ctypes.PyDLL(None).pause()
"""


def test_a_process_that_holds_the_interpreter_ends_though_nobody_reads_its_log() -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLDS_THE_INTERPRETER], stderr=subprocess.PIPE)
    try:
        assert process.wait(WAIT_SECONDS) == 1
    finally:
        process.kill()
        process.communicate()
