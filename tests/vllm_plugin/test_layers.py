"""Pages are read in whatever order a backend keeps them."""

import pytest
import torch

from spectrumkv.common.errors import FailedPreconditionError
from spectrumkv.vllm_plugin.layers import EngineLayer, PageReader, slots_of
from tests.vllm_plugin.fake_engine import PAGE_TOKENS, fake_layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(1, 32), (3, 64)])
def test_what_a_backend_wrote_is_read_bit_for_bit(kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    (layer,) = fake_layers(1, kv_heads, head_dim, dtype)
    tokens, blocks = 2 * PAGE_TOKENS + 5, [7, 0, 3]
    states = torch.randn(2, tokens, kv_heads, head_dim).to(dtype)
    layer.write(states[0], states[1], layer.pages, slots_of(blocks, PAGE_TOKENS, 0, tokens))
    keys, values = PageReader(layer).read(layer, torch.tensor(blocks), tokens)
    assert torch.equal(keys, states[0].transpose(0, 1))
    assert torch.equal(values, states[1].transpose(0, 1))
    layer.pages.zero_()
    assert torch.equal(keys, states[0].transpose(0, 1))


def test_a_backend_that_loses_elements_is_refused() -> None:
    (layer,) = fake_layers(1, 1, 32)
    lossy = EngineLayer(**{**vars(layer), "write": lambda keys, values, pages, slots: None})
    with pytest.raises(FailedPreconditionError, match="cannot read its pages"):
        PageReader(lossy)


def test_slots_follow_the_blocks() -> None:
    assert slots_of([5, 2], 4, 2, 7).tolist() == [22, 23, 8, 9, 10]
