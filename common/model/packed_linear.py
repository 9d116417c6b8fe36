"""Packs the weights of linear layers into the order in which oneDNN's kernels read them.

On a CPU torch multiplies by MKL, which reads the weights as they are stored. With few rows, as in a decode step, a
model takes about twice as long that way as over packed weights, and torch's public alternatives take longer, too
(docs/adr/0115-packed-linear.md).
"""

import platform
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

# The number of rows that weights are packed for. One row has an order of its own, which is slower for more rows; all
# other numbers share one order.
_ROWS = 8


class PackedLinear(nn.Module):
    """Computes the same product as `nn.Linear`, over packed weights.

    Args:
        linear: the layer to replace; its weight is float32 `[outputs, inputs]` on a CPU.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = linear.bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Multiply by the weight and add the bias; differentiable with respect to `inputs`.

        Args:
            inputs: float32 `[..., inputs]`.

        Returns:
            float32 `[..., outputs]`.
        """
        if torch.is_grad_enabled() and inputs.requires_grad:
            differentiable: torch.Tensor = _Product.apply(inputs, self.weight, self.bias)  # type: ignore[no-untyped-call]
            return differentiable
        return _product(inputs, self.weight, self.bias)


class _Product(torch.autograd.Function):
    """Adds the derivative that oneDNN's operator lacks."""

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
    """Return whether packed weights are faster here: measured for float32 on x86 processors, and used only there."""
    return (
        model.device.type == "cpu"
        and model.dtype == torch.float32
        and platform.machine() in ("x86_64", "AMD64")
        and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    )


def pack_linear_layers(module: nn.Module) -> None:
    """Replace every `nn.Linear` in a module by a `PackedLinear`.

    Layers are replaced one after the other, so that only one is in memory twice.

    Args:
        module: the module, float32 on a CPU.
    """
    for name, child in module.named_children():
        if type(child) is nn.Linear:
            setattr(module, name, PackedLinear(child))
        else:
            pack_linear_layers(child)
