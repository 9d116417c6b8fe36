"""A pulse that stands still fails the vitals once; work that beats and idle threads do not."""

import signal
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from spectrumkv.common.liveness.vitals import CALL_THAT_IS_OVER, MODEL, Vitals
from spectrumkv.common.liveness.watchdog import LIMITS_WITHOUT_A_LOOK, LOOKS, Watchdog
from spectrumkv.common.liveness.watchdog_timer import WatchdogTimer

LIMIT_SECONDS = 0.2
WAIT_SECONDS = 30.0


def test_there_is_a_pulse_while_there_is_work() -> None:
    vitals = Vitals()
    assert not vitals.pulses
    with vitals.working():
        first = vitals.pulses
        assert [(one.thread, one.what) for one in first] == [(threading.get_ident(), MODEL)]
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


def test_work_within_work_has_the_pulse() -> None:
    vitals = Vitals()
    with vitals.working():
        (outer,) = vitals.pulses
        with vitals.working("the tokenizer"):
            assert [one.what for one in vitals.pulses] == ["the tokenizer"]
        assert list(vitals.pulses) == [outer]
    assert not vitals.pulses


def test_a_thread_without_work_has_no_pulse_to_beat() -> None:
    vitals = Vitals()
    vitals.beat()
    assert not vitals.pulses


def test_a_call_that_is_over_has_a_pulse_until_it_has_left() -> None:
    vitals = Vitals()
    told: list[Callable[[], object]] = []
    with vitals.leaving_after(told.append):
        assert not vitals.pulses
        told[0]()
        assert [one.what for one in vitals.pulses] == [CALL_THAT_IS_OVER]
        before = vitals.pulses
        with vitals.working():
            vitals.beat()
            assert before.items() <= vitals.pulses.items()
    assert not vitals.pulses
    # gRPC ends a call after its thread has left, where all went well.
    told[0]()
    assert not vitals.pulses


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
    monkeypatch.setattr(WatchdogTimer, "set", lambda *_: None)
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
    monkeypatch.setattr(WatchdogTimer, "set", lambda *_: looks.release())
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
from spectrumkv.common.liveness.vitals import Vitals
from spectrumkv.common.liveness.watchdog import Watchdog
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


LOOKS_AT_WORK = """
import sys
from spectrumkv.common.liveness.vitals import Vitals
from spectrumkv.common.liveness.watchdog import Watchdog
vitals = Vitals()
watchdog = Watchdog(vitals, {limit})
watchdog.start()
with vitals.working():
    for line in sys.stdin:
        vitals.beat()
        print(vitals.failure, flush=True)
"""


@pytest.mark.slow
def test_a_process_that_was_stopped_for_longer_than_every_limit_goes_on() -> None:
    limit = 1.0
    command = [sys.executable, "-c", LOOKS_AT_WORK.format(limit=limit)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def beat() -> str:
            process.stdin.write("\n")
            process.stdin.flush()
            return process.stdout.readline()

        assert beat() == "None\n"
        for _ in range(2):
            process.send_signal(signal.SIGSTOP)
            threading.Event().wait(1.5 * LIMITS_WITHOUT_A_LOOK * limit)
            process.send_signal(signal.SIGCONT)
            assert beat() == "None\n"
        process.stdin.close()
        assert process.wait(WAIT_SECONDS) == 0
