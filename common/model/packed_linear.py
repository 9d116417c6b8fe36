"""Linear layers whose weights lie in memory in the order in which oneDNN's kernels read them.

torch multiplies by MKL on a CPU, which reads the weights as they are stored: with few rows, as in a decode step, it
takes two to four times what oneDNN takes over weights packed once (docs/adr/0045-packed-linear-layers.md).
"""

import platform
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

# Weights packed for one row alone have another order, which is slower for more; all other numbers share one.
_ROWS = 8


class PackedLinear(nn.Module):
    """The same product as `nn.Linear`, over packed weights.

    Args:
        linear: the layer to replace, `[outputs, inputs]`, on a CPU.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = linear.bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[..., inputs]` → `[..., outputs]`; differentiable by its inputs."""
        if torch.is_grad_enabled() and inputs.requires_grad:
            differentiable: torch.Tensor = _Product.apply(inputs, self.weight, self.bias)  # type: ignore[no-untyped-call]
            return differentiable
        return _product(inputs, self.weight, self.bias)


class _Product(torch.autograd.Function):
    """oneDNN's operator has no derivative of its own."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return _product(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return gradients[0] @ weight.to_dense(), None, None


def _product(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
    return product


def can_pack(model: PreTrainedModel) -> bool:
    """Whether packed weights are faster here: measured for float32 on x86 processors, and taken there only."""
    return (
        model.device.type == "cpu"
        and model.dtype == torch.float32
        and platform.machine() in ("x86_64", "AMD64")
        and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    )


def pack_linear_layers(module: nn.Module) -> None:
    """Replace every `nn.Linear` within by a `PackedLinear`, one after the other, so that few are in memory twice."""
    for name, child in module.named_children():
        if type(child) is nn.Linear:
            setattr(module, name, PackedLinear(child))
        else:
            pack_linear_layers(child)
