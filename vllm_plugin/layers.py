"""What the connector knows of vLLM's attention layers, and how keys and values lie in their pages."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from spectrumkv.common.errors import FailedPreconditionError

# Digits of an element's number: each is exact in bfloat16, whose integers are up to 256.
_DIGIT = 128
_LAYER = re.compile(r"\.layers?\.(\d+)\.")

Write = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Writes keys and values, `[n, kv_heads, head_dim]` each, into the pages of its third argument, at the slots (int64
`[n]`) of its fourth."""


@dataclass(frozen=True, eq=False)
class EngineLayer:
    """One attention layer of the engine.

    Attributes:
        name: as vLLM knows it.
        index: from 0.
        scaling: factor of query · key before the softmax.
        softcap: bound of the logits; None is no bound.
        sliding_window: a query does not see tokens at this distance or farther; None is all of them.
        pages: `[pages, kv_heads, page tokens, 2 · head_dim]`; elements lie in a page in the backend's own order.
        write: of the layer's backend.
    """

    name: str
    index: int
    scaling: float
    softcap: float | None
    sliding_window: int | None
    pages: torch.Tensor
    write: Write

    @property
    def page_tokens(self) -> int:
        """Count the tokens of a page."""
        return self.pages.shape[2]

    @property
    def kv_heads(self) -> int:
        """Count the KV heads of this rank."""
        return self.pages.shape[1]

    @property
    def head_dim(self) -> int:
        """Count the elements of one key or value."""
        return self.pages.shape[3] // 2


def engine_layers(kv_caches: Mapping[str, torch.Tensor], modules: Mapping[str, Any]) -> list[EngineLayer]:
    """Describe the attention layers of an engine, in the model's order.

    Args:
        kv_caches: pages by layer, as `register_kv_caches` gets them.
        modules: layers by name, vLLM's `static_forward_context`.

    Returns:
        The layers.

    Raises:
        FailedPreconditionError: a layer's cache or its attention is of a kind that cannot be handed out.
    """
    found = []
    for name, pages in kv_caches.items():
        number = _LAYER.search(name)
        module = modules[name]
        if number is None or pages.dim() != 4 or not hasattr(module.impl, "do_kv_cache_update"):
            raise FailedPreconditionError(
                f"layer {name} has a KV cache of shape {list(pages.shape)} written by {type(module.impl).__name__}; "
                "SpectrumKVConnector handles attention whose cache is [pages, KV heads, tokens, 2 · head_dim]"
            )
        if pages.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise FailedPreconditionError(
                f"layer {name} keeps its KV as {pages.dtype}; leave out --kv-cache-dtype for SpectrumKVConnector"
            )
        found.append(
            EngineLayer(
                name=name,
                index=int(number[1]),
                scaling=float(module.impl.scale),
                softcap=float(getattr(module.impl, "logits_soft_cap", 0) or 0) or None,
                sliding_window=getattr(module, "sliding_window", None),
                pages=pages,
                write=_writer(module),
            )
        )
    found.sort(key=lambda layer: layer.index)
    if [layer.index for layer in found] != list(range(len(found))):
        raise FailedPreconditionError(
            f"the layers here are {[layer.index for layer in found]}; pipeline parallelism is not supported"
        )
    return found


def _writer(module: Any) -> Write:
    def write(keys: torch.Tensor, values: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor) -> None:
        module.impl.do_kv_cache_update(module, keys, values, pages, slots)

    return write


class PageReader:
    """Reads keys and values out of pages, whatever the order of elements in a page.

    Backends store pages in an order of their own, such as keys column by column for some vector units. What the
    backend writes into a page of zeros tells the order: each element gets its own number, digit by digit.

    Args:
        layer: whose backend writes; all layers of a model have the same order.
    """

    def __init__(self, layer: EngineLayer) -> None:
        shape = (2, layer.page_tokens, layer.kv_heads, layer.head_dim)
        numbers = torch.arange(layer.pages[0].numel())
        slots = torch.arange(layer.page_tokens, device=layer.pages.device)
        order = torch.zeros_like(numbers)
        scale = 1
        while scale < numbers.numel():
            digits = (numbers // scale % _DIGIT).view(shape).to(layer.pages)
            page = torch.zeros_like(layer.pages[:1])
            layer.write(digits[0].contiguous(), digits[1].contiguous(), page, slots)
            order += page.reshape(-1).cpu().long() * scale
            scale *= _DIGIT
        places = torch.empty_like(order)
        places[order] = numbers
        if not torch.equal(order.sort().values, numbers):
            raise FailedPreconditionError(
                "the attention backend does not keep each element of keys and values in a place of its own; "
                "SpectrumKVConnector cannot read its pages"
            )
        # Where the elements of [2, kv_heads, page tokens, head_dim] lie.
        self._places = places.view(shape).transpose(1, 2).reshape(-1).to(layer.pages.device)

    def read(self, layer: EngineLayer, page_ids: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy the keys and values of a prompt out of its pages.

        Args:
            layer: any of the model.
            page_ids: int64 `[m]`, the pages of the first `tokens` tokens.
            tokens: how many to read.

        Returns:
            Keys and values, `[kv_heads, tokens, head_dim]` each: copies, so that the pages may be used anew.
        """
        pages = layer.pages[page_ids].reshape(len(page_ids), -1)
        shape = (len(page_ids), 2, layer.kv_heads, layer.page_tokens, layer.head_dim)
        ordered = pages[:, self._places].view(shape)
        joined = ordered.permute(1, 2, 0, 3, 4).reshape(2, layer.kv_heads, -1, layer.head_dim)[:, :, :tokens]
        return joined[0], joined[1]


def slots_of(block_ids: Sequence[int], block_tokens: int, first: int, end: int) -> torch.Tensor:
    """Return the slots of a run of positions.

    Args:
        block_ids: blocks of the scheduler, from the request's first token on.
        block_tokens: tokens of such a block; a backend's page may have fewer.
        first: the first position.
        end: after the last one.

    Returns:
        int64 `[end - first]`.
    """
    positions = torch.arange(first, end)
    blocks = torch.tensor(block_ids, dtype=torch.int64)
    return blocks[positions // block_tokens] * block_tokens + positions % block_tokens
