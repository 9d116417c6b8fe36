"""LMCache runs the pair as one of its own: found by name, submitted, signalled, and back within its buffer."""

import os
import select

import pytest
import torch

lmcache = pytest.importorskip("lmcache")

from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey  # noqa: E402
from lmcache.v1.distributed.serde import SerdeConfig, create_serde_processor  # noqa: E402
from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj  # noqa: E402

import spectrumkv.vllm_plugin.lmcache.serde  # noqa: E402, F401
from spectrumkv.common.errors import InvalidArgumentError  # noqa: E402

SHAPE, DTYPE, SECONDS = torch.Size([2, 3, 256, 128]), torch.bfloat16, 30.0
KEY = ObjectKey(chunk_hash=b"0" * 32, model_name="m", kv_rank=0)


def memory(tensor: torch.Tensor, form: MemoryFormat) -> TensorMemoryObj:
    raw = tensor.view(torch.uint8).flatten()
    return TensorMemoryObj(raw, MemoryObjMetadata(tensor.shape, tensor.dtype, 0, raw.numel(), 1, fmt=form), None)


def wait(descriptor: int) -> None:
    assert select.select([descriptor], [], [], SECONDS)[0]
    os.eventfd_read(descriptor)


def test_a_chunk_goes_through_lmcaches_processor() -> None:
    processor = create_serde_processor(SerdeConfig("spectrumkv", {"head_dim": 64, "budget": 0.3}))
    try:
        sent = torch.randn(SHAPE).to(DTYPE)
        size = processor.estimate_serialized_size(MemoryLayoutDesc(shapes=[SHAPE], dtypes=[DTYPE]))
        assert size < 0.36 * sent.numel() * 2
        buffer = memory(torch.zeros(size, dtype=torch.uint8), MemoryFormat.BINARY_BUFFER)
        task = processor.submit_serialize([memory(sent, MemoryFormat.KV_2LTD)], [buffer], [KEY])
        wait(processor.get_serialize_event_fd())
        assert processor.query_serialize_result(task) is True
        arrived = torch.zeros(SHAPE, dtype=DTYPE)
        task = processor.submit_deserialize([buffer], [memory(arrived, MemoryFormat.KV_2LTD)], [KEY])
        wait(processor.get_deserialize_event_fd())
        assert processor.query_deserialize_result(task) is True
        assert float((arrived - sent).float().norm() / sent.float().norm()) < 0.2
    finally:
        processor.close()


@pytest.mark.parametrize(
    "options", [{}, {"head_dim": "64"}, {"head_dim": 64, "budgte": 1}, {"head_dim": 64, "policy": "spectral"}]
)
def test_options_are_checked(options: dict[str, object]) -> None:
    with pytest.raises(InvalidArgumentError):
        create_serde_processor(SerdeConfig("spectrumkv", options))
