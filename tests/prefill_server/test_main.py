"""A model whose context is too short to calibrate and probe can still be served by policies that need neither."""

from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from spectrumkv.common.errors import ContextTooShortError
from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.model.load import LoadedModel, load_model
from spectrumkv.common.service.config import PrefillConfig
from spectrumkv.prefill_server import main
from spectrumkv.prefill_server.engine import PrefillEngine
from spectrumkv.prefill_server.main import tune
from spectrumkv.prefill_server.transfer.plan import KvPlan
from spectrumkv.v1 import prefill_pb2
from tests.tiny_models import tiny_model

# Calibration and probe refuse such a model before they run it.
NO_ENGINE = cast(PrefillEngine, None)


@pytest.fixture(scope="module")
def short() -> LoadedModel:
    loaded = load_model(str(tiny_model("llama")), "cpu")
    return replace(loaded, context_length=64, spec=replace(loaded.spec, context_length=64))


@pytest.mark.parametrize("policy", ["native", "adaptive"])
def test_policies_without_a_basis_are_served(short: LoadedModel, policy: str, caplog: Any) -> None:
    config = PrefillConfig(policy=policy)
    basis, verdict = tune(short, NO_ENGINE, config)
    assert basis is None
    assert verdict.int4.off == frozenset(range(short.geometry.layers))
    assert "calibration needs a context" in verdict.reason
    assert "policies that need a basis are refused" in caplog.text
    assert KvPlan.resolve(prefill_pb2.KvOptions(), config, verdict, seed=0).policy.name == policy


def test_the_spectral_policy_needs_calibration(short: LoadedModel) -> None:
    with pytest.raises(ContextTooShortError, match="has 64"):
        tune(short, NO_ENGINE, PrefillConfig(policy="spectral"))


def test_kernels_of_a_gpu_are_compiled_with_a_prompt_of_the_model(
    short: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    coded: list[LayerCapture] = []
    monkeypatch.setattr(main, "encode_once", lambda captures, geometry: coded.extend(captures))
    engine = PrefillEngine(short, window=16)
    engine.start()
    main.compile_for_gpu(short, engine)
    assert not coded
    # The model itself runs on the CPU here; on a GPU nothing differs but where the captures are.
    main.compile_for_gpu(replace(short, device=torch.device("cuda")), engine)
    engine.stop()
    [capture] = coded
    assert capture.tokens == short.context_length
    assert capture.queries.shape[1] == 16
