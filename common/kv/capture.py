"""What one layer shows of a prompt while the model runs it: all that scoring and coding see of the model."""

import math
from dataclasses import dataclass, replace

import torch

from spectrumkv.common.errors import InvalidArgumentError


@dataclass(frozen=True, eq=False)
class LayerCapture:
    """What one layer shows of a prompt of `n` tokens.

    Attributes:
        queries: `[query_heads, w, head_dim]`, any float dtype, after RoPE: those of the last `w` positions,
            1 ≤ w ≤ n. Query head h reads KV head h // (query_heads / kv_heads).
        keys: `[kv_heads, n, head_dim]`, after RoPE.
        values: like `keys`.
        scaling: factor of query · key before the softmax.
        softcap: bound c of the logits, which become c · tanh(logits / c) (Gemma 2); None is no bound.
        sliding_window: a query does not see tokens at this distance or farther; None is all of them.
        layer: from 0.
        computed: on a GPU, the event after which the tensors hold their values; None where they hold them already.
        first: position of the first token shown; above 0 where only a prompt's later tokens are.

    Raises:
        InvalidArgumentError: the shapes do not fit together or a number is out of its range.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    scaling: float
    softcap: float | None
    sliding_window: int | None
    layer: int
    computed: torch.cuda.Event | None = None
    first: int = 0

    def __post_init__(self) -> None:
        self._check_shapes()
        if not 0 < self.scaling < math.inf:
            raise InvalidArgumentError(f"attention scaling is {self.scaling}; it must be positive and finite")
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise InvalidArgumentError(f"softcap is {self.softcap}; it must be positive and finite, or None")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise InvalidArgumentError(f"sliding window is {self.sliding_window}; it must be at least 1, or None")
        if self.layer < 0:
            raise InvalidArgumentError(f"layer is {self.layer}; it must not be negative")

    def _check_shapes(self) -> None:
        queries, keys, values = (tuple(one.shape) for one in (self.queries, self.keys, self.values))
        fits = (
            len(queries) == len(keys) == 3
            and keys == values
            and min(queries + keys) > 0
            and queries[0] % keys[0] == 0
            and queries[1] <= keys[1]
            and queries[2] == keys[2]
        )
        if not fits:
            raise InvalidArgumentError(
                f"queries {queries}, keys {keys} and values {values} do not fit together; wanted are "
                "[query_heads, w, head_dim] and twice [kv_heads, n, head_dim], none of them empty, with w ≤ n "
                "and query_heads a multiple of kv_heads"
            )

    @property
    def tokens(self) -> int:
        """Count the tokens that the capture shows, n."""
        return self.keys.shape[1]

    def since(self, first: int) -> "LayerCapture":
        """Cut off the tokens before a position, and the queries that are more than what is left.

        Args:
            first: position of the first token to show.

        Returns:
            A capture of views.
        """
        keys, values = self.keys[:, first - self.first :], self.values[:, first - self.first :]
        return replace(self, queries=self.queries[:, -keys.shape[1] :], keys=keys, values=values, first=first)
