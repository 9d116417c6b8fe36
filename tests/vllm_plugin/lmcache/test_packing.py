"""Chunks of a cache come back from their packed form, within the bytes that were promised."""

import pytest
import torch

from spectrumkv.common.errors import DataLossError, InvalidArgumentError
from spectrumkv.vllm_plugin.lmcache.packing import Packer

LAYERS, KV_HEADS, HEAD_DIM = 3, 2, 64


def states(tokens: int = 256, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    shape = (2, LAYERS, tokens, KV_HEADS * HEAD_DIM)
    return torch.randn(shape, generator=torch.Generator().manual_seed(tokens)).to(dtype)


@pytest.mark.parametrize("tokens", [1, 5, 256, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("policy", "budget", "error"),
    [("greedy", 0.25, 0.2), ("greedy", 0.3, 0.2), ("sink-protect", 0.3, 0.2), ("uniform-int8", 0.5, 0.02),
     ("fp16", 1.0, 0.001)],
)  # fmt: skip
def test_a_chunk_comes_back(policy: str, budget: float, error: float, dtype: torch.dtype, tokens: int) -> None:
    packer, sent = Packer(policy, budget, HEAD_DIM), states(tokens, dtype)
    packed = packer.pack(sent)
    assert len(packed) <= packer.most_bytes(sent.shape, dtype)
    arrived = torch.zeros_like(sent)
    # LMCache stores whole buffers, which are longer.
    packer.unpack(memoryview(packed + b"\xff" * 99), arrived)
    assert float((arrived - sent).float().norm() / sent.float().norm()) <= error


def test_the_promised_bytes_are_few() -> None:
    packer, sent = Packer("greedy", 0.3, HEAD_DIM), states()
    fp16 = sent.numel() * 2
    # A scale for each token, head and side is 1/64 of 16 bits an element here.
    assert len(packer.pack(sent)) < 0.33 * fp16
    assert packer.most_bytes(sent.shape, sent.dtype) < 0.36 * fp16


@pytest.mark.parametrize("place", [0, 5, 20, 60, 3000])
def test_damage_is_noticed(place: int) -> None:
    packer, sent = Packer("greedy", 0.3, HEAD_DIM), states()
    packed = bytearray(packer.pack(sent))
    packed[place] ^= 4
    with pytest.raises(DataLossError):
        packer.unpack(memoryview(packed), torch.zeros_like(sent))


def test_a_chunk_that_is_cut_off_is_refused() -> None:
    packer, sent = Packer("greedy", 0.3, HEAD_DIM), states()
    packed = packer.pack(sent)
    for length in (0, 40, len(packed) - 1):
        with pytest.raises(DataLossError):
            packer.unpack(memoryview(packed[:length]), torch.zeros_like(sent))


def test_a_chunk_of_another_shape_is_refused() -> None:
    packer = Packer("greedy", 0.3, HEAD_DIM)
    packed = packer.pack(states(256))
    with pytest.raises(DataLossError):
        packer.unpack(memoryview(packed), torch.zeros_like(states(255)))
    with pytest.raises(InvalidArgumentError, match="wanted is"):
        packer.pack(torch.zeros(2, LAYERS, 4, KV_HEADS * HEAD_DIM + 1))


@pytest.mark.parametrize(("policy", "budget"), [("spectral", 0.3), ("native", 1.0), ("sws", 0.5), ("adaptive", 0.2)])
def test_policies_that_need_queries_positions_or_masks_are_refused(policy: str, budget: float) -> None:
    with pytest.raises(InvalidArgumentError):
        Packer(policy, budget, HEAD_DIM)
