"""Packed linear layers compute what `nn.Linear` computes."""

import pytest
import torch
from torch import nn

from spectrumkv.common.model.load import LoadedModel, load_model
from spectrumkv.common.model.packed_linear import PackedLinear, can_pack
from tests.tiny_models import ARCHITECTURES, tiny_model


@pytest.fixture(scope="module", autouse=True)
def packed_here() -> None:
    if not can_pack(load_model(str(tiny_model("llama")), "cpu", packed=False).model):
        pytest.skip("not packed on this machine")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 65])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (3, 17), (192, 576), (1000, 33)])
@pytest.mark.parametrize("contiguous", [True, False])
def test_the_product_is_that_of_linear(outputs: int, inputs: int, rows: int, bias: bool, contiguous: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias=bias)
    given = torch.randn(2, 2 * rows, inputs)[:, ::2] if not contiguous else torch.randn(2, rows, inputs)
    with torch.inference_mode():
        computed = PackedLinear(linear)(given)
        doubled = linear.bias.double() if bias else None
        expected = nn.functional.linear(given.double(), linear.weight.double(), doubled)
    assert computed.shape == (2, rows, outputs)
    torch.testing.assert_close(computed.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_its_derivative_is_that_of_linear(bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(40, 24, bias=bias).requires_grad_(False)
    packed = PackedLinear(linear)
    gradients = []
    for layer in (linear, packed):
        given = torch.linspace(-1, 1, 6 * 40).view(2, 3, 40).requires_grad_()
        layer(given).square().sum().backward()
        gradients.append(given.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_linear_layer_of_a_model_is_packed_and_the_model_predicts_the_same(architecture: str) -> None:
    directory = str(tiny_model(architecture))
    packed, plain = load_model(directory, "cpu"), load_model(directory, "cpu", packed=False)
    assert layers(packed, nn.Linear) == []
    assert layers(packed, PackedLinear) == layers(plain, nn.Linear) != []
    assert packed.spec == plain.spec
    ids = torch.arange(2, 41)[None]
    with torch.inference_mode():
        predicted, expected = (one.model(input_ids=ids).logits for one in (packed, plain))
    torch.testing.assert_close(predicted, expected, rtol=1e-3, atol=1e-4)


def test_other_dtypes_are_left_alone() -> None:
    assert layers(load_model(str(tiny_model("llama")), "cpu", "bfloat16"), PackedLinear) == []


def layers(loaded: LoadedModel, kind: type[nn.Module]) -> list[str]:
    return [name for name, module in loaded.model.named_modules() if type(module) is kind]
