"""A service whose model fails or hangs says so, tells its callers, and ends; others take over (docs/faults.md)."""

import contextlib
import re
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from spectrumkv.common.errors import DeadlineExceededError, InternalError, UnavailableError
from spectrumkv.common.liveness.watchdog import LIMITS_WITHOUT_A_LOOK
from spectrumkv.common.rpc.channel import open_channel
from spectrumkv.common.service.serving import EXIT_BROKEN, STOP_SECONDS
from spectrumkv.prefill_server.workers.lease import ADMISSION_SECONDS
from tests.faults import sabotage
from tests.faults.deployment import Service, until
from tests.faults.fleet import Fleet, running_fleet
from tests.faults.incubator import Incubator
from tests.faults.requests import RunningRequest
from tests.tiny_models import tiny_model

# Fixtures have bounds of their own; the first one may wait for a compiler.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(120, func_only=True)]

STUCK_SECONDS = 2.0
# For two cores that others use, too.
SLACK_SECONDS = 5.0
OPTIONS = {"policy": "fp16", "budget": "1", "kv_memory": "64MiB", "grace": "1"}
LONG = 2000
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, incubator: Incubator) -> Iterator[Fleet]:
    """One prefill, two decode workers."""
    directory = tmp_path_factory.mktemp("broken")
    options = {**OPTIONS, "stuck_after": f"{STUCK_SECONDS:g}"}
    with running_fleet(directory, tiny_model("llama"), incubator, prefills=1, **options) as running:
        yield running


@pytest.fixture(autouse=True)
def whole_again(fleet: Fleet) -> Iterator[None]:
    """Start again what a test broke, and wait until prefill knows."""
    yield
    for service in fleet.services:
        if service.switch.exists():
            service.kill()
            service.switch.unlink()
            service.start()
            service.wait_until_serving()
    metrics = fleet.prefills[0].metrics
    until(lambda: metrics()["decode_worker_accepting"] == len(fleet.decodes), 30, "prefill finds its workers")


def request(fleet: Fleet, max_tokens: int) -> RunningRequest:
    return RunningRequest(fleet.addresses, 8, max_tokens)


def busy(fleet: Fleet) -> Service:
    """The worker that generates."""
    return next(service for service in fleet.decodes if service.held().requests)


def log_of(service: Service) -> str:
    return service.log.read_text(errors="replace")


class Health:
    """What a service's health says while the block runs, and until its connection is lost.

    A thread reads at once: gRPC drops what nobody has read when a connection is lost.
    """

    def __init__(self, service: Service) -> None:
        self._channel = open_channel(str(service.address))
        self._told: list[int] = []
        self._reader = threading.Thread(target=self._read, name="health")

    def __enter__(self) -> "Health":
        self._watch = health_pb2_grpc.HealthStub(self._channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)
        assert next(self._watch).status == SERVING
        self._reader.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._channel.close()
        self._reader.join()

    def _read(self) -> None:
        with contextlib.suppress(grpc.RpcError):
            for response in self._watch:
                self._told.append(response.status)

    def until_the_end(self) -> list[int]:
        """Every status that was told, in order; the service has ended."""
        self._reader.join(SLACK_SECONDS)
        assert self._watch.code() is grpc.StatusCode.UNAVAILABLE
        return self._told


@pytest.mark.parametrize(
    ("trouble", "seconds", "sentence"),
    [
        (sabotage.FAILING_STEP, 2.0, "3 decode steps failed one after another, the last with RuntimeError: injected"),
        (sabotage.LOST_DEVICE, 0.0, "the device is lost: AcceleratorError: CUDA error: injected"),
        (sabotage.DEAD_ENGINE, 0.0, "the decode engine failed: RuntimeError: injected"),
        (sabotage.FROZEN_STEP, STUCK_SECONDS, "the model has made no progress for 2 s (--stuck-after)"),
        (
            sabotage.HELD_INTERPRETER,
            LIMITS_WITHOUT_A_LOOK * STUCK_SECONDS,
            "no Python has run in this process for 10 s (--stuck-after)",
        ),
    ],
)
def test_a_broken_decode_worker_tells_its_callers_and_ends(
    fleet: Fleet, trouble: str, seconds: float, sentence: str
) -> None:
    running = request(fleet, LONG)
    running.wait_for_tokens(3)
    broken = busy(fleet)
    with Health(broken) as health:
        broken.sabotage(trouble)
        running.wait_for_end(seconds + SLACK_SECONDS)
        assert isinstance(running.error, UnavailableError)
        while trouble == sabotage.FAILING_STEP and broken.process and broken.process.returncode is None:
            another = request(fleet, 4)
            another.wait_for_tokens(4)
            another.close()
        assert broken.wait_for_end(seconds + SLACK_SECONDS) == EXIT_BROKEN
        # Where no thread can run, none can say so.
        assert health.until_the_end() == [NOT_SERVING] * (trouble != sabotage.HELD_INTERPRETER)
    running.close()
    assert sentence in log_of(broken)
    if trouble in (sabotage.FROZEN_STEP, sabotage.HELD_INTERPRETER):
        assert "in _step" in log_of(broken), "the stack of the step that hangs"
    later = request(fleet, 4)
    later.wait_for_tokens(4)
    later.close()


def test_requests_lose_nothing_to_a_worker_whose_steps_fail(fleet: Fleet) -> None:
    expected = request(fleet, 4)
    expected.wait_for_end(30)
    fleet.decodes[0].sabotage(sabotage.FAILING_STEP)

    def ask(_: int) -> list[int]:
        asked = request(fleet, 4)
        asked.wait_for_end(60)
        asked.close()
        assert asked.error is None
        return asked.token_ids

    with ThreadPoolExecutor(4) as clients:
        answers = list(clients.map(ask, range(48)))
    assert answers == [expected.token_ids] * 48
    expected.close()
    # Three requests that failed together in one step have it ejected before three steps have failed, which end it.
    broken = fleet.decodes[0]
    ejected = fleet.prefills[0].metrics()["decode_worker_ejected"] == 1
    assert ejected or broken.wait_for_end(SLACK_SECONDS) == EXIT_BROKEN


@pytest.mark.parametrize(
    ("trouble", "what"),
    [
        (sabotage.FROZEN_PASS, "the model"),
        (sabotage.FROZEN_CODING, "the model"),
        (sabotage.FROZEN_TOKENIZER, "the tokenizer"),
    ],
)
def test_a_prefill_that_hangs_tells_its_callers_and_ends(fleet: Fleet, trouble: str, what: str) -> None:
    (prefill,) = fleet.prefills
    with Health(prefill) as health:
        prefill.sabotage(trouble)
        waiting = request(fleet, 4)
        waiting.wait_for_end(STUCK_SECONDS + SLACK_SECONDS)
        waiting.close()
        assert isinstance(waiting.error, UnavailableError)
        assert prefill.wait_for_end(SLACK_SECONDS) == EXIT_BROKEN
        assert health.until_the_end() == [NOT_SERVING]
    assert f"{what} has made no progress for 2 s (--stuck-after)" in log_of(prefill)
    assert "in _freeze" in log_of(prefill)


def test_a_prefill_whose_model_computes_no_numbers_tells_its_callers_and_ends(fleet: Fleet) -> None:
    (prefill,) = fleet.prefills
    with Health(prefill) as health:
        prefill.sabotage(sabotage.NOT_FINITE)
        asked = request(fleet, 4)
        asked.wait_for_end(SLACK_SECONDS)
        asked.close()
        assert isinstance(asked.error, InternalError)
        assert "NaN" in asked.error.message
        assert prefill.wait_for_end(SLACK_SECONDS) == EXIT_BROKEN
        assert health.until_the_end() == [NOT_SERVING]
    assert "the model fails on requests and on a prompt of the service's own: NotFiniteError" in log_of(prefill)


def all_are_answered(asked: list[RunningRequest], seconds: float) -> None:
    """Wait until each request has ended, which takes so long at most, and hold it to have no error."""
    for one in asked:
        one.wait_for_end(seconds)
        assert one.error is None
        one.close()


def test_a_worker_that_hangs_as_kv_arrives_ends_and_its_requests_go_on(fleet: Fleet) -> None:
    hanging = fleet.decodes[0]
    hanging.sabotage(sabotage.FROZEN_DECODING)
    asked = [request(fleet, 4) for _ in range(6)]
    all_are_answered(asked, STUCK_SECONDS + SLACK_SECONDS)
    assert hanging.wait_for_end(SLACK_SECONDS) == EXIT_BROKEN
    assert "the model has made no progress for 2 s (--stuck-after)" in log_of(hanging)
    assert "in _freeze" in log_of(hanging)


def test_a_request_whose_thread_hangs_outside_of_the_model_ends_prefill_once_its_time_is_over(fleet: Fleet) -> None:
    (prefill,) = fleet.prefills
    prefill.sabotage(sabotage.FROZEN_SAMPLING)
    asked = RunningRequest(fleet.addresses, 8, 4, timeout=1.0)
    asked.wait_for_end(1.0 + SLACK_SECONDS)
    asked.close()
    assert isinstance(asked.error, DeadlineExceededError)
    assert prefill.wait_for_end(STUCK_SECONDS + SLACK_SECONDS) == EXIT_BROKEN
    assert "the thread of a call that is over has made no progress for 2 s (--stuck-after)" in log_of(prefill)
    assert "in _freeze" in log_of(prefill)


def test_a_lock_that_nobody_lets_go_ends_the_worker_and_its_requests_go_on(fleet: Fleet) -> None:
    holding = fleet.decodes[0]
    holding.sabotage(sabotage.HELD_LOCK)
    # Of two, so that each worker is asked.
    asked = [request(fleet, 4) for _ in range(4)]
    all_are_answered(asked, ADMISSION_SECONDS + SLACK_SECONDS)
    assert holding.wait_for_end(STUCK_SECONDS + SLACK_SECONDS) == EXIT_BROKEN
    assert "the thread of a call that is over has made no progress for 2 s (--stuck-after)" in log_of(holding)
    assert "in _hold_lock" in log_of(holding)


@pytest.mark.parametrize("service", ["prefill", "decode"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_start_that_hangs_ends_at_a_signal(fleet: Fleet, service: str, number: signal.Signals) -> None:
    (starting,) = fleet.prefills if service == "prefill" else fleet.decodes[:1]
    starting.kill()
    starting.log.write_text("")
    starting.sabotage(sabotage.FROZEN_START)
    starting.start()
    until(lambda: sabotage.FROZEN in log_of(starting), 60, "the start hangs")
    starting.send(number)
    # The status of a process that a signal ended.
    assert starting.wait_for_end(SLACK_SECONDS) == -number


@pytest.mark.parametrize(
    ("service", "trouble"), [("decode", sabotage.FROZEN_STEP), ("prefill", sabotage.FROZEN_PASS)]
)
@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGINT], [signal.SIGTERM, signal.SIGTERM]])
def test_a_process_that_hangs_ends_when_it_is_told_to(
    tmp_path: Path, incubator: Incubator, service: str, trouble: str, signals: list[signal.Signals]
) -> None:
    # Nothing else may notice: the watchdog has its default of two minutes.
    with running_fleet(tmp_path, tiny_model("llama"), incubator, size=1, **OPTIONS) as alone:
        (hanging,) = alone.decodes if service == "decode" else alone.prefills
        running = request(alone, LONG)
        running.wait_for_tokens(3)
        hanging.sabotage(trouble)
        second = request(alone, LONG)
        until(lambda: sabotage.FROZEN in log_of(hanging), 10, "the model hangs")
        told_at = time.monotonic()
        for number in signals:
            hanging.send(number)
        assert hanging.wait_for_end(float(OPTIONS["grace"]) + STOP_SECONDS + SLACK_SECONDS) == EXIT_BROKEN
        if len(signals) == 1:
            assert time.monotonic() - told_at >= float(OPTIONS["grace"])
        for one in (running, second):
            one.wait_for_end(SLACK_SECONDS)
            assert isinstance(one.error, UnavailableError)
            one.close()
        assert re.search(rf"the {service} engine has not stopped within \d s", log_of(hanging))
        assert "in _freeze" in log_of(hanging), "the stack of what hangs"


def test_a_step_that_hangs_while_the_process_drains_does_not_wait_for_the_grace(
    tmp_path: Path, incubator: Incubator
) -> None:
    options = {**OPTIONS, "grace": "100", "stuck_after": f"{STUCK_SECONDS:g}"}
    with running_fleet(tmp_path, tiny_model("llama"), incubator, size=1, **options) as alone:
        (decode,), (prefill,) = alone.decodes, alone.prefills
        running = request(alone, LONG)
        running.wait_for_tokens(3)
        for service in (decode, prefill):
            service.send(signal.SIGTERM)
            until(lambda log=service.log: "draining" in log.read_text(), 10, "the signal is taken")
        decode.sabotage(sabotage.FROZEN_STEP)
        running.wait_for_end(STUCK_SECONDS + SLACK_SECONDS)
        assert isinstance(running.error, UnavailableError)
        running.close()
        assert decode.wait_for_end(SLACK_SECONDS) == EXIT_BROKEN
        # Nothing hangs here: it has ended its last request in order.
        assert prefill.wait_for_end(STOP_SECONDS) == 0
