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
from spectrumkv.common.kv.scoring import Observation
from spectrumkv.prefill_server.engine.attention import KvTap

# Least tokens of a part, by device: few enough that a short prompt's wait for one is short, enough that parts cost
# little. Where none are stated prompts run in one pass: on a GPU parts would leave the fused causal kernels.
PART_TOKENS = {"cpu": 2048}


def part_bounds(tokens: int, least: int | None) -> list[int]:
    """Where parts begin, and the end of the last one.

    Args:
        tokens: of the prompt.
        least: tokens of a part, of which there are as many as there can be; None is one part.
    """
    parts = 1 if least is None else max(1, tokens // least)
    return [tokens * part // parts for part in range(parts + 1)]


@dataclass(eq=False)
class PromptParts:
    """How far a prompt is.

    Attributes:
        token_ids: the prompt.
        bounds: of its parts.
        leaves_in_parts: whether the tap is shown each part, or the whole prompt with its last part.
    """

    token_ids: Sequence[int]
    bounds: Sequence[int]
    leaves_in_parts: bool
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

    def run(self, model: PreTrainedModel, kv_tap: KvTap, wanted: Callable[[], bool], window: int) -> torch.Tensor:
        """Compute the next part.

        Args:
            model: with the tapped attention.
            kv_tap: takes the layers' observations.
            wanted: asked at each layer whether anybody still waits for the prompt.
            window: how many of the last queries the tap gets.

        Returns:
            logits of the part's last position, `[vocab]`.

        Raises:
            CancelledError: nobody does.
        """
        first, end = self.bounds[self._done : self._done + 2]
        is_last = end == len(self.token_ids)

        def tap(observation: Observation) -> None:
            if self.leaves_in_parts:
                kv_tap(_on_its_own(observation.since(first)))
            elif is_last:
                kv_tap(observation)
            if not wanted():
                raise CancelledError("the request ended")

        ids = torch.tensor([list(self.token_ids[first:end])], device=model.device)
        logits: torch.Tensor = model(
            input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1, kv_taps=[tap], window=window
        ).logits[0, -1]
        self._done += 1
        if is_last:
            self._cache = None
        return logits


def _on_its_own(observation: Observation) -> Observation:
    """The same in memory of its own: a view keeps the cache of all parts so far from being freed."""
    return replace(observation, keys=observation.keys.clone(), values=observation.values.clone())
