"""A failure of the model ends the service only where the model fails on a prompt of the service's own, too."""

import math
import threading
from collections.abc import Iterator

import pytest
import torch

from spectrumkv.common.errors import CancelledError, InvalidArgumentError, NotFiniteError
from spectrumkv.common.model.load import LoadedModel, load_model
from spectrumkv.prefill_server.engine import PrefillEngine
from spectrumkv.prefill_server.model_check import ModelCheck
from tests.tiny_models import tiny_model


@pytest.fixture
def loaded() -> LoadedModel:
    return load_model(str(tiny_model("llama")), "cpu")


@pytest.fixture
def engine(loaded: LoadedModel) -> Iterator[PrefillEngine]:
    with PrefillEngine(loaded, 8) as engine:
        yield engine


def fail(check: ModelCheck, error: Exception) -> None:
    with pytest.raises(type(error)), check.after_failure():
        raise error


@pytest.mark.parametrize("error", [NotFiniteError("NaN"), RuntimeError("the device said no")])
@pytest.mark.parametrize("name", ["model.layers.0.input_layernorm.weight", "model.norm.weight"])
def test_a_model_that_is_broken_ends_the_service(
    loaded: LoadedModel, engine: PrefillEngine, name: str, error: Exception
) -> None:
    failed = threading.Event()
    engine.vitals.on_failure(failed.set)
    with torch.no_grad():
        loaded.model.get_parameter(name).fill_(math.nan)
    fail(ModelCheck(loaded, engine), error)
    assert failed.wait(10)
    assert "a prompt of the service's own" in str(engine.vitals.failure)


def test_a_prompt_that_overflows_the_model_ends_nothing(loaded: LoadedModel, engine: PrefillEngine) -> None:
    check = ModelCheck(loaded, engine)
    for _ in range(10):
        fail(check, NotFiniteError("NaN"))
    engine.submit_call(lambda: None).result()
    assert engine.vitals.failure is None


def test_a_model_that_cannot_run_ends_the_service(
    loaded: LoadedModel, engine: PrefillEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = threading.Event()
    engine.vitals.on_failure(failed.set)
    monkeypatch.setattr(loaded.model, "forward", lambda *_, **__: 1 / 0)
    fail(ModelCheck(loaded, engine), ZeroDivisionError("a pass failed"))
    assert failed.wait(10)
    assert "ZeroDivisionError" in str(engine.vitals.failure)


@pytest.mark.parametrize("error", [InvalidArgumentError("no"), CancelledError("gone")])
def test_what_is_no_fault_of_the_model_is_not_looked_into(
    loaded: LoadedModel, engine: PrefillEngine, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(engine, "submit", None)
    fail(ModelCheck(loaded, engine), error)


def test_an_engine_that_has_stopped_is_left_alone(loaded: LoadedModel) -> None:
    stopped = PrefillEngine(loaded, 8)
    stopped.stop()
    fail(ModelCheck(loaded, stopped), NotFiniteError("NaN"))
    assert stopped.vitals.failure is None
