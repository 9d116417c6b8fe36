"""Keeps the last queries of each prompt that is being computed: what scores come from."""

import torch


class QueryWindow:
    """Keeps the queries of a prompt's last positions in each layer, across the chunks of its prefill.

    A prompt that is computed anew, because it lost its pages, begins at an earlier position than it had reached; what
    was kept from there on is dropped.

    Args:
        prompt_tokens: of the prompt.
        window: how many queries are wanted; after a hit in the prefix cache there may be fewer.
    """

    def __init__(self, prompt_tokens: int, window: int) -> None:
        self._from = max(0, prompt_tokens - window)
        self._first: dict[int, int] = {}
        self._queries: dict[int, torch.Tensor] = {}

    def wants(self, first: int, count: int) -> bool:
        """Tell whether some queries of a chunk are wanted.

        Args:
            first: position of the chunk's first token.
            count: tokens of the chunk.

        Returns:
            Whether they are.
        """
        return first + count > self._from

    def add(self, layer: int, first: int, queries: torch.Tensor) -> None:
        """Keep the wanted queries of a chunk.

        Args:
            layer: from 0.
            first: position of the first query.
            queries: `[n, query_heads, head_dim]` after RoPE, in a buffer that will be used anew.
        """
        skip = max(0, self._from - first)
        kept, start = queries[skip:].clone(), first + skip
        held = self._queries.get(layer)
        if held is not None and self._first[layer] < start <= self._first[layer] + len(held):
            kept = torch.cat([held[: start - self._first[layer]], kept])
            start = self._first[layer]
        self._queries[layer], self._first[layer] = kept, start

    def take(self, layer: int) -> torch.Tensor:
        """Return a layer's queries, and keep them no longer.

        Args:
            layer: from 0.

        Returns:
            `[query_heads, w, head_dim]`, those of the last w positions.
        """
        return self._queries.pop(layer).transpose(0, 1)
