"""The producing half of a worker: what runs beside each layer of the model."""

import torch

from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.vllm_plugin.layers import EngineLayer, PageReader, slots_of
from spectrumkv.vllm_plugin.prefill.coder import Coder
from spectrumkv.vllm_plugin.prefill.outbox import Outbox
from spectrumkv.vllm_plugin.prefill.query_window import QueryWindow
from spectrumkv.vllm_plugin.scheduler.steps import PrefillStep, ProducerStep


class ProducerWorker:
    """Taps the prompts of each step.

    Args:
        layers: of the model, by name.
        block_tokens: tokens of the scheduler's blocks.
        window: queries at a prompt's end that are kept.
        coder: codes what is tapped.
        outbox: holds what was coded.
    """

    def __init__(
        self, layers: dict[str, EngineLayer], block_tokens: int, window: int, coder: Coder, outbox: Outbox
    ) -> None:
        self._layers, self._block_tokens, self._window = layers, block_tokens, window
        self._coder, self._outbox = coder, outbox
        self._reader = PageReader(next(iter(layers.values())))
        self._windows: dict[str, QueryWindow] = {}
        self._steps: tuple[PrefillStep, ...] = ()
        self._rows: dict[str, int] | None = None
        self._pages: dict[str, torch.Tensor] = {}

    def begin_step(self, step: ProducerStep) -> None:
        """Take in what the next step computes.

        Args:
            step: as the scheduler's side decided.
        """
        for transfer_id in step.discards:
            self._outbox.discard(transfer_id)
            self._windows.pop(transfer_id, None)
        self._rows, self._pages, taken = None, {}, []
        for one in step.prefills:
            self._windows.setdefault(one.transfer_id, QueryWindow(one.prompt_tokens, self._window))
            if not one.is_last:
                taken.append(one)
            elif self._coder.reserve(one):
                taken.append(one)
                self._pages[one.request_id] = self._page_ids(one)
        self._steps = tuple(taken)

    def tap(self, name: str, queries: torch.Tensor, slots: torch.Tensor) -> None:
        """Keep the queries that will be scored.

        Args:
            name: of the layer.
            queries: `[rows, query_heads, head_dim]` of all requests of the step, after RoPE.
            slots: int64 `[rows]`, where each row's keys and values were written; negative for padding.
        """
        wanted = [one for one in self._steps if self._windows[one.transfer_id].wants(one.first, one.count)]
        if not wanted:
            return
        if self._rows is None:
            self._rows = self._find_rows(wanted, slots)
        for one in wanted:
            row = self._rows[one.request_id]
            self._windows[one.transfer_id].add(self._layers[name].index, one.first, queries[row : row + one.count])

    def save(self, name: str) -> None:
        """Copy a layer of the prompts that this step completes, and have it coded.

        Args:
            name: of the layer.
        """
        layer = self._layers[name]
        for one in self._steps:
            if not one.is_last:
                continue
            keys, values = self._reader.read(layer, self._pages[one.request_id], one.prompt_tokens)
            window = self._windows[one.transfer_id]
            capture = LayerCapture(
                queries=window.take(layer.index),
                keys=keys,
                values=values,
                scaling=layer.scaling,
                softcap=layer.softcap,
                sliding_window=layer.sliding_window,
                layer=layer.index,
            )
            self._coder.put(one, capture)
            if layer.index == len(self._layers) - 1:
                del self._windows[one.transfer_id]

    def end_step(self) -> None:
        """Forget the step; layers that run outside of steps, to warm up, are not tapped."""
        self._steps = ()

    def _find_rows(self, steps: list[PrefillStep], slots: torch.Tensor) -> dict[str, int]:
        """Return the batch row of each request's first token; a request's rows follow each other."""
        row_of = {slot: row for row, slot in enumerate(slots.tolist())}
        return {
            one.request_id: row_of[int(slots_of(one.block_ids, self._block_tokens, one.first, one.first + 1))]
            for one in steps
        }

    def _page_ids(self, step: PrefillStep) -> torch.Tensor:
        """Return the pages of a prompt, in the backend's numbering, whose pages may be smaller than blocks."""
        layer = next(iter(self._layers.values()))
        slots = slots_of(step.block_ids, self._block_tokens, 0, step.prompt_tokens)[:: layer.page_tokens]
        return (slots // layer.page_tokens).to(layer.pages.device)
