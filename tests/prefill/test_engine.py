import threading

import pytest

from spectrumkv.common.errors import CancelledError
from spectrumkv.common.kv.scoring import Observation
from spectrumkv.common.model.load import load_model
from spectrumkv.prefill_server.engine import PrefillEngine
from tests.tiny_models import tiny_model


@pytest.fixture
def engine():
    engine = PrefillEngine(load_model(str(tiny_model("llama")), "cpu", "auto"), window=4)
    yield engine
    engine.stop()


def test_a_short_prompt_does_not_wait_for_long_ones_that_wait(engine):
    order: list[int] = []

    def tap(observation: Observation) -> None:
        if observation.layer == 0:
            order.append(observation.keys.shape[1])

    busy = threading.Event()
    engine.submit_call(busy.wait)
    futures = [engine.submit([5] * tokens, tap) for tokens in (300, 200, 3)]
    assert engine.waiting == 3
    busy.set()
    for future in futures:
        assert future.result(60).logits.ndim == 1
    assert order == [3, 200, 300]
    assert engine.waiting == 0


def test_a_prompt_that_is_cancelled_while_it_waits_is_not_run(engine):
    busy = threading.Event()
    engine.submit_call(busy.wait)
    cancelled = engine.submit([5] * 3, lambda observation: pytest.fail("it ran"))
    other = engine.submit([5] * 9, lambda observation: None)
    assert cancelled.cancel()
    assert engine.waiting == 1
    busy.set()
    other.result(60)


def test_what_the_tap_raises_ends_one_prompt_alone(engine):
    def refuse(observation: Observation) -> None:
        raise CancelledError("enough")

    ended, other = engine.submit([5] * 3, refuse), engine.submit([5] * 9, lambda observation: None)
    with pytest.raises(CancelledError, match="enough"):
        ended.result(60)
    assert other.result(60).compute_seconds > 0
