"""Long prompts run in parts, so that short ones need not wait for all of them, and so that what can leave early does.

A part's queries attend over the keys of the parts before it, kept in a cache of the model's own. Scores look at the
prompt's last queries, so that KV which follows them leaves with the last part, layer by layer; other KV leaves with
each part.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from transformers import DynamicCache, PreTrainedModel

from spectrumkv.common.errors import CancelledError
from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.prefill_server.engine.attention import KvHook

# Least tokens of a part, by device: few enough that a short prompt's wait for one is short, enough that parts cost
# little. Where none are stated prompts run in one pass: on a GPU parts would leave the fused causal kernels.
CHUNK_TOKENS = {"cpu": 2048}


def chunk_bounds(tokens: int, least: int | None) -> list[int]:
    """Where parts begin, and the end of the last one.

    Args:
        tokens: of the prompt.
        least: tokens of a part, of which there are as many as there can be; None is one part.
    """
    parts = 1 if least is None else max(1, tokens // least)
    return [tokens * part // parts for part in range(parts + 1)]


@dataclass(eq=False)
class ChunkedPrefill:
    """How far a prompt is.

    Attributes:
        token_ids: the prompt.
        bounds: of its parts.
        streams_chunks: whether the hook is shown each part, or the whole prompt with its last part.
    """

    token_ids: Sequence[int]
    bounds: Sequence[int]
    streams_chunks: bool
    _done: int = 0
    _cache: DynamicCache | None = field(default_factory=DynamicCache)

    @property
    def several(self) -> bool:
        """Whether there is more than one."""
        return len(self.bounds) > 2

    @property
    def tokens_left(self) -> int:
        """Tokens that are not computed yet."""
        return len(self.token_ids) - self.bounds[self._done]

    def run(self, model: PreTrainedModel, kv_hook: KvHook, wanted: Callable[[], bool], window: int) -> torch.Tensor:
        """Compute the next part.

        Args:
            model: with the hooked attention.
            kv_hook: takes the layers' captures.
            wanted: asked at each layer whether anybody still waits for the prompt.
            window: how many of the last queries the hook gets.

        Returns:
            logits of the part's last position, `[vocab]`.

        Raises:
            CancelledError: nobody does.
        """
        first, end = self.bounds[self._done : self._done + 2]
        is_last = end == len(self.token_ids)

        def hook(capture: LayerCapture) -> None:
            if self.streams_chunks:
                kv_hook(_on_its_own(capture.since(first)))
            elif is_last:
                kv_hook(capture)
            if not wanted():
                raise CancelledError("the request ended")

        ids = torch.tensor([list(self.token_ids[first:end])], device=model.device)
        logits: torch.Tensor = model(
            input_ids=ids,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
            kv_hooks=[hook],
            window=window,
        ).logits[0, -1]
        self._done += 1
        if is_last:
            self._cache = None
        return logits


def _on_its_own(capture: LayerCapture) -> LayerCapture:
    """The same in memory of its own: a view keeps the cache of all parts so far from being freed."""
    return replace(capture, keys=capture.keys.clone(), values=capture.values.clone())
