"""What the engine tells requests and the process when steps fail, hang, or the thread itself breaks."""

import threading
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from prometheus_client import CollectorRegistry

from spectrumkv.common.errors import InternalError, UnavailableError
from spectrumkv.common.model.load import LoadedModel
from spectrumkv.common.telemetry.metrics import Metrics
from spectrumkv.decode_server.admission import admit
from spectrumkv.decode_server.bases import BasisStore
from spectrumkv.decode_server.engine import FAILED_STEPS, DecodeEngine
from spectrumkv.decode_server.kv_pool import KvPool
from spectrumkv.decode_server.model_runner import DecodeRow, EagerRunner
from spectrumkv.decode_server.request import DecodeRequest, GeneratedToken
from spectrumkv.v1.decode_pb2 import FirstToken
from tests.decode_server.test_admission import begin, loaded, pool  # noqa: F401  # fixtures

MAX_TOKENS = 5


class OpenScope:
    """An RPC whose caller waits."""

    def on_end(self, callback: Callable[[], object]) -> None:
        """Never call back."""

    def check(self) -> None:
        """Find nothing."""


class Steps:
    """Stands before the model: each step does what the test says."""

    def __init__(self) -> None:
        self.trouble: Callable[[], None] = lambda: None

    def before(self, forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def changed(runner: EagerRunner, rows: Sequence[DecodeRow]) -> torch.Tensor:
            self.trouble()
            return forward(runner, rows)

        return changed


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    steps = Steps()
    monkeypatch.setattr(EagerRunner, "_forward", steps.before(EagerRunner._forward))
    return steps


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(CollectorRegistry())


@pytest.fixture
def engine(steps: Steps, loaded: LoadedModel, pool: KvPool, metrics: Metrics) -> Iterator[DecodeEngine]:  # noqa: F811
    engine = DecodeEngine(loaded, pool, 4, metrics)
    engine.start()
    yield engine
    engine.stop()


@pytest.fixture
def ask(loaded: LoadedModel, pool: KvPool, engine: DecodeEngine) -> Callable[[], list[GeneratedToken]]:  # noqa: F811
    """Generate from a prompt of five tokens."""
    bases = BasisStore(loaded.geometry)

    def generate() -> list[GeneratedToken]:
        with admit(begin(loaded, max_tokens=MAX_TOKENS), loaded, pool, bases) as request:
            answers = without_kv(request).start([FirstToken(token_id=7)])
            return list(engine.generate(answers, OpenScope()))  # type: ignore[arg-type]

    return generate


def without_kv(request: DecodeRequest) -> DecodeRequest:
    """The request with zeros for the KV of its prompt."""
    for layer in range(request.allocation.pool.geometry.layers):
        request.allocation.keys(layer, 0, 5)[:] = 0
        request.allocation.values(layer, 0, 5)[:] = 0
    return request


def fail() -> None:
    raise RuntimeError("injected")


def test_one_step_that_fails_costs_its_requests_only(
    engine: DecodeEngine, steps: Steps, ask: Callable[[], list[GeneratedToken]], metrics: Metrics
) -> None:
    for _ in range(2 * FAILED_STEPS):
        steps.trouble = fail
        with pytest.raises(
            UnavailableError, match="a decode step failed: RuntimeError: injected; try another worker"
        ):
            ask()
        steps.trouble = lambda: None
        assert len(ask()) == MAX_TOKENS - 1
    assert engine.vitals.failure is None
    count = metrics.registry.get_sample_value
    assert count("spectrumkv_decode_steps_total", {"outcome": "failed"}) == 2 * FAILED_STEPS
    assert count("spectrumkv_decode_steps_total", {"outcome": "ok"}) == 2 * FAILED_STEPS * (MAX_TOKENS - 1)


def test_steps_that_fail_one_after_another_are_the_workers_end(
    engine: DecodeEngine, steps: Steps, ask: Callable[[], list[GeneratedToken]]
) -> None:
    steps.trouble = fail
    for _ in range(FAILED_STEPS):
        assert engine.vitals.failure is None
        with pytest.raises(UnavailableError):
            ask()
    assert engine.vitals.failure == "3 decode steps failed one after another, the last with RuntimeError: injected"
    steps.trouble = lambda: None
    with pytest.raises(UnavailableError, match="works no more"):
        ask()


def test_a_lost_device_is_the_workers_end_at_once(
    engine: DecodeEngine, steps: Steps, ask: Callable[[], list[GeneratedToken]]
) -> None:
    def lose() -> None:
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    steps.trouble = lose
    with pytest.raises(UnavailableError):
        ask()
    assert engine.vitals.failure == "the device is lost: AcceleratorError: CUDA error: unspecified launch failure"


def test_an_error_outside_of_a_step_is_the_workers_end_and_requests_hear_of_it(
    engine: DecodeEngine, ask: Callable[[], list[GeneratedToken]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DecodeEngine, "_end_step", lambda self, finished: fail())
    with pytest.raises(UnavailableError, match="works no more"):
        ask()
    assert engine.vitals.failure == "the decode engine failed: RuntimeError: injected"


def test_requests_leave_a_step_that_hangs_once_the_watchdog_has_spoken(
    engine: DecodeEngine,
    steps: Steps,
    ask: Callable[[], list[GeneratedToken]],
    pool: KvPool,  # noqa: F811
) -> None:
    hanging, release = threading.Event(), threading.Event()

    def hang() -> None:
        hanging.set()
        release.wait(60)

    def speak() -> None:
        assert hanging.wait(60)
        engine.vitals.fail("it hangs")

    steps.trouble = hang
    watchdog = threading.Thread(target=speak)
    watchdog.start()
    with pytest.raises(UnavailableError, match="works no more"):
        ask()
    watchdog.join()
    release.set()


def test_a_thread_that_does_not_stop_is_not_waited_for(
    engine: DecodeEngine, steps: Steps, ask: Callable[[], list[GeneratedToken]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spectrumkv.decode_server.engine.STOP_SECONDS", 0.1)
    hanging, release = threading.Event(), threading.Event()

    def hang() -> None:
        hanging.set()
        release.wait(60)

    steps.trouble = hang

    def stop() -> None:
        assert hanging.wait(60)
        engine.stop()

    stopping = threading.Thread(target=stop)
    stopping.start()
    with pytest.raises(UnavailableError):
        ask()
    stopping.join()
    assert engine.vitals.failure is not None
    assert engine.vitals.failure.startswith("the decode engine has not stopped within 0.1 s; its thread is at")
    assert "in _step" in engine.vitals.failure
    release.set()


def test_logits_that_are_no_numbers_are_the_requests_own_and_no_failed_step(
    engine: DecodeEngine, ask: Callable[[], list[GeneratedToken]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model computes numbers for a token that has no KV before it."""
    forward = EagerRunner._forward

    def broken_by_kv(self: EagerRunner, rows: Sequence[DecodeRow]) -> torch.Tensor:
        return forward(self, rows) * (float("nan") if any(row.position for row in rows) else 1.0)

    monkeypatch.setattr(EagerRunner, "_forward", broken_by_kv)
    for _ in range(2 * FAILED_STEPS):
        with pytest.raises(InternalError, match="logit"):
            ask()
    assert engine.vitals.failure is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_computes_no_numbers_at_all_is_the_workers_end(
    engine: DecodeEngine, ask: Callable[[], list[GeneratedToken]], monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    failed = threading.Event()
    engine.vitals.on_failure(failed.set)
    forward = EagerRunner._forward
    monkeypatch.setattr(EagerRunner, "_forward", lambda self, rows: forward(self, rows) * value)
    with pytest.raises(InternalError, match="logit"):
        ask()
    assert failed.wait(60)
    assert "a token of the service's own" in str(engine.vitals.failure)
    with pytest.raises(UnavailableError, match="works no more"):
        ask()
