"""Runs long prompts in chunks: short prompts need not wait for all of them, and KV that may leave early does.

A chunk's queries attend over the keys of the chunks before it, kept in a cache of the model's own. Scores look at the
prompt's last queries, so KV whose tier depends on scores leaves with the last chunk, layer by layer; other KV leaves
with each chunk.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from transformers import DynamicCache, PreTrainedModel

from spectrumkv.common.errors import CancelledError
from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.prefill_server.engine.attention import KvHook

# Fewest tokens of a chunk, by device: few enough that a short prompt waits little for a chunk, enough that chunks
# cost little. A device not named here runs prompts in one pass: on a GPU chunks would leave the fused causal kernels.
CHUNK_TOKENS = {"cpu": 2048}


def chunk_bounds(tokens: int, chunk_tokens: int | None) -> list[int]:
    """Divide a prompt evenly into as many chunks as there can be.

    Args:
        tokens: of the prompt.
        chunk_tokens: fewest tokens of a chunk; None for one chunk.

    Returns:
        Where each chunk begins, and the end of the last one.
    """
    chunks = 1 if chunk_tokens is None else max(1, tokens // chunk_tokens)
    return [tokens * chunk // chunks for chunk in range(chunks + 1)]


@dataclass(eq=False)
class ChunkedPrefill:
    """Runs one prompt chunk by chunk, and knows how far it is.

    Attributes:
        token_ids: the prompt.
        bounds: where each chunk begins, and the end of the last one.
        streams_chunks: whether the hook is shown each chunk, or the whole prompt with its last chunk.
        logits_hook: takes each chunk's logits, `[tokens, vocab]` in the model's dtype and on its device;
            None where only those of the last token are wanted.
    """

    token_ids: Sequence[int]
    bounds: Sequence[int]
    streams_chunks: bool
    logits_hook: Callable[[torch.Tensor], None] | None = None
    _chunks_done: int = 0
    _cache: DynamicCache | None = field(default_factory=DynamicCache)

    @property
    def runs_alone(self) -> bool:
        """Whether the prompt shares no pass with others: it takes several, or all of its logits are wanted."""
        return len(self.bounds) > 2 or self.logits_hook is not None

    @property
    def tokens_left(self) -> int:
        """Tokens that are not computed yet."""
        return len(self.token_ids) - self.bounds[self._chunks_done]

    def run_chunk(
        self, model: PreTrainedModel, kv_hook: KvHook, is_wanted: Callable[[], bool], window: int
    ) -> torch.Tensor:
        """Compute the next chunk.

        Args:
            model: with the hooked attention.
            kv_hook: takes the layers' captures.
            is_wanted: asked at each layer whether anybody still waits for the prompt.
            window: how many of the last queries the hook gets.

        Returns:
            Logits `[vocab]` of the chunk's last position, in the model's dtype and on its device.

        Raises:
            CancelledError: nobody waits for the prompt any more.
        """
        first, end = self.bounds[self._chunks_done : self._chunks_done + 2]
        is_last = end == len(self.token_ids)

        def hook(capture: LayerCapture) -> None:
            if self.streams_chunks:
                kv_hook(_copied(capture.since(first)))
            elif is_last:
                kv_hook(capture)
            if not is_wanted():
                raise CancelledError("the request ended")

        ids = torch.tensor([list(self.token_ids[first:end])], device=model.device)
        logits: torch.Tensor = model(
            input_ids=ids,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1 if self.logits_hook is None else 0,
            kv_hooks=[hook],
            window=window,
        ).logits[0]
        if self.logits_hook is not None:
            self.logits_hook(logits)
        self._chunks_done += 1
        if is_last:
            self._cache = None
        return logits[-1]


def _copied(capture: LayerCapture) -> LayerCapture:
    """Return the capture in memory of its own: a view keeps the cache of all chunks so far from being freed."""
    return replace(capture, keys=capture.keys.clone(), values=capture.values.clone())
