"""What decode measures, and what it does when its device is lost before a step."""

import threading
from collections.abc import Iterator

import pytest
import torch
from prometheus_client import CollectorRegistry

from spectrumkv.common.errors import UnavailableError
from spectrumkv.common.model.load import LoadedModel
from spectrumkv.common.service.config import DecodeConfig, build
from spectrumkv.common.telemetry.metrics import Metrics
from spectrumkv.decode_server.admission import admit
from spectrumkv.decode_server.bases import BasisStore
from spectrumkv.decode_server.service import DecodeService
from spectrumkv.v1.decode_pb2 import FirstToken
from tests.decode_server.test_admission import begin, loaded  # noqa: F401  # fixture
from tests.decode_server.test_engine import OpenScope, without_kv

PAUSE_SECONDS = 1.0
# All steps of the tiny model together take less than the pause.
MAX_TOKENS = 20


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(CollectorRegistry())


@pytest.fixture
def service(loaded: LoadedModel, metrics: Metrics) -> Iterator[DecodeService]:  # noqa: F811
    service = DecodeService(loaded, build(DecodeConfig, {"kv_memory": "1MiB"}), metrics)
    service.start()
    yield service
    service.stop()


def test_a_caller_that_reads_slowly_makes_no_token_late(
    service: DecodeService,
    loaded: LoadedModel,  # noqa: F811
    metrics: Metrics,
) -> None:
    bases = BasisStore(loaded.geometry)
    with admit(begin(loaded, max_tokens=MAX_TOKENS), loaded, service._pool, bases) as request:
        answers = service._generate(without_kv(request), [FirstToken(token_id=7)], OpenScope())  # type: ignore[arg-type]
        next(answers)
        threading.Event().wait(PAUSE_SECONDS)
        assert sum(answer.HasField("token") for answer in answers) == MAX_TOKENS - 2
    sample = metrics.registry.get_sample_value
    assert sample("spectrumkv_inter_token_latency_seconds_count") == MAX_TOKENS - 2
    seconds = sample("spectrumkv_inter_token_latency_seconds_sum")
    assert seconds is not None
    assert 0 < seconds < PAUSE_SECONDS


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    ],
    ids=["torch", "triton"],
)
def test_a_device_that_is_lost_while_kv_arrives_is_the_workers_end(
    service: DecodeService, error: RuntimeError
) -> None:
    with pytest.raises(UnavailableError, match="has lost its device; try another worker"):
        write_kv(service, error)
    assert service.vitals.failure == f"the device is lost: {error}"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        ValueError("CUDA error"),
    ],
    ids=["torch", "cuda", "triton", "other"],
)
def test_a_request_that_finds_no_memory_leaves_the_worker_alone(service: DecodeService, error: Exception) -> None:
    with pytest.raises(type(error)):
        write_kv(service, error)
    assert service.vitals.failure is None


def write_kv(service: DecodeService, error: Exception) -> None:
    """Fail as a handler does that writes received KV to the slots."""
    with service._device_watched():
        raise error
