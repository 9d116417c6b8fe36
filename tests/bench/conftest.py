from collections.abc import Callable
from importlib.resources import files

import pytest

from spectrumkv.bench.methods.served_model import ServedModel
from spectrumkv.bench.methods.wire_method import WireMethod
from spectrumkv.bench.models.synthetic_prompt import synthetic_basis
from spectrumkv.common.model.load import LoadedModel, load_model
from spectrumkv.common.service.config import PrefillConfig, build
from spectrumkv.prefill_server.transfer.plan import KvPlan
from spectrumkv.prefill_server.verdict import ProbeVerdict
from spectrumkv.v1 import prefill_pb2
from tests.tiny_models import tiny_model

CAPACITY = 160
WINDOW = 16
# A text that is long enough for a few small windows.
TEXT = (files("spectrumkv.prefill_server.tuning.needle") / "haystack.txt").read_text(encoding="utf-8")[:6000]

MakeMethod = Callable[..., WireMethod]


@pytest.fixture(scope="session")
def tiny_llama() -> LoadedModel:
    return load_model(str(tiny_model("llama")), "cpu", "auto")


@pytest.fixture(scope="session")
def served(tiny_llama: LoadedModel) -> ServedModel:
    return ServedModel(tiny_llama, WINDOW, CAPACITY)


def wire_method(served: ServedModel, policy: str, **options: str | float) -> WireMethod:
    """The policy as a prefill service with default options would carry it out."""
    asked = prefill_pb2.KvOptions(policy=policy, **options)
    basis = synthetic_basis(served.loaded.geometry)
    verdict = ProbeVerdict.from_flag("on", served.loaded.geometry.layers)
    plan = KvPlan.resolve(asked, build(PrefillConfig, {}), verdict, seed=0, basis=basis)
    return WireMethod(plan, served.loaded.spec, PrefillConfig.chunk_bytes, served.metrics)
