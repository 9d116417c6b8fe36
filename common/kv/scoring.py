"""How important each token's KV is, judged from what one layer shows while it runs the prompt.

A scorer sees one layer's `LayerCapture` and returns a number per token; policies only rank by it. Each
scorer is one function, registered by name in `scorers`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.registry import Registry
from spectrumkv.kernels.attention_scores import accumulated_attention

SINK_TOKENS = 4
"""How many of the first tokens are attention sinks (StreamingLLM, arXiv 2309.17453, section 3.1): they draw attention
whatever they say, and their keys and values are unlike all others. SinkProtect and PDTrim keep as many, too."""

DECAY_RATE = 0.005
"""λ of `decay` and `position`, per token; the middle one of those that the paper sweeps (.001, .005, .01)."""


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
        seed: the request's seed, for scorers that draw.
        layer: from 0.
        computed: on a GPU, when the states are there; None is now.
        first: position of the first token, where only the latter ones of a prompt are shown.

    Raises:
        InvalidArgumentError: the shapes do not fit together or a number is out of its range.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    scaling: float
    softcap: float | None
    sliding_window: int | None
    seed: int
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
        if self.seed < 0 or self.layer < 0:
            raise InvalidArgumentError(f"seed is {self.seed} and layer is {self.layer}; neither may be negative")

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
        """Length n of the prompt."""
        return self.keys.shape[1]

    def since(self, first: int) -> "LayerCapture":
        """Show the tokens from position `first` on only; no more queries than those are shown."""
        keys, values = self.keys[:, first - self.first :], self.values[:, first - self.first :]
        return replace(self, queries=self.queries[:, -keys.shape[1] :], keys=keys, values=values, first=first)

    def seen_by(self) -> torch.Tensor:
        """How many of the observed positions see each token, at least 1: float32 `[n]`.

        Query i stands at position n − w + i.
        """
        tokens, window = self.tokens, self.queries.shape[1]
        # How many positions there are from each token to the end, itself included.
        left = torch.arange(tokens, 0, -1, dtype=torch.float32, device=self.keys.device)
        if self.sliding_window is None or self.sliding_window >= tokens:
            return left.clamp_(max=window)
        unseeing = (left - self.sliding_window).clamp_(min=0)
        return left.clamp_(max=window).sub_(unseeing).clamp_(min=1)


Scorer = Callable[[LayerCapture], torch.Tensor]
"""Maps an capture of n tokens to float32 `[n]` on the capture's device: finite, higher is more important."""

scorers: Registry[Scorer] = Registry("scorer")


def observed_attention(capture: LayerCapture) -> torch.Tensor:
    """Mean attention that each token gets from the observed queries, per KV head.

    The mean runs over the query heads of the KV head and over those queries that can see the token, so that
    the last tokens, which few queries see, are not punished for it. (Observing the last queries only is
    SnapKV's idea, arXiv 2404.14469; it averages over the whole window.) Logits take w × n elements a head,
    never n × n, and are computed in float32 whatever dtype the model has.

    Returns:
        float32 `[kv_heads, n]`, from 0 to 1; 0 where a sliding window hides the token from every query.
    """
    kv_heads, _, head_dim = capture.keys.shape
    query_heads, window, _ = capture.queries.shape
    # All queries of one KV head in one matrix: grouped-query attention without repeating the keys.
    queries = capture.queries.float().mul(capture.scaling).reshape(kv_heads, -1, head_dim)
    received = accumulated_attention(queries, capture.keys, window, capture.sliding_window, capture.softcap)
    return received / (capture.seen_by() * (query_heads // kv_heads))


@scorers.register("attention")
def attention(capture: LayerCapture) -> torch.Tensor:
    """Mean observed attention over the layer's heads: the paper's attention statistic A."""
    return observed_attention(capture).mean(dim=0)


@scorers.register("decay")
def decay(capture: LayerCapture) -> torch.Tensor:
    """Attention that fades with distance: A_j · exp(−λ (n − j)) (SpectrumKV, Method), λ = `DECAY_RATE`.

    Tokens are counted j = 1 … n, so the last one keeps its whole score. Beyond about 100 / λ tokens the factor
    is 0 in float32; such tokens tie, and policies rank a tie by position.
    """
    return attention(capture) * position(capture)


@scorers.register("key_norm")
def key_norm(capture: LayerCapture) -> torch.Tensor:
    """Minus the mean L2 norm of the token's keys; needs no attention statistic.

    The paper names "KV norm" as the stand-in and says no more. Keys of low norm are those that draw attention
    (Devoto et al. 2024, "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", arXiv
    2406.11430), hence the sign. RoPE rotates and leaves norms as they are.
    """
    norms: torch.Tensor = torch.linalg.vector_norm(capture.keys, dim=-1, dtype=torch.float32)
    return -norms.mean(dim=0)


@scorers.register("position")
def position(capture: LayerCapture) -> torch.Tensor:
    """exp(−λ (n − j)) alone, which is what the quality scripts released with the paper compute."""
    distance = torch.arange(capture.tokens - 1, -1, -1, dtype=torch.float32, device=capture.keys.device)
    return torch.exp(-DECAY_RATE * distance)


@scorers.register("random")
def random(capture: LayerCapture) -> torch.Tensor:
    """Uniform in [0, 1): the control that every other scorer has to beat. One draw per seed and layer."""
    generator = np.random.default_rng((capture.seed, capture.layer))
    return torch.from_numpy(generator.random(capture.tokens, dtype=np.float32)).to(capture.keys.device)


def combine(scores_by_layer: Sequence[torch.Tensor]) -> torch.Tensor:
    """One score per token for all layers: the mean of its ranks in the layers.

    Policies use nothing of a score but its rank, and ranks give every layer the same say for every scorer: they
    do not mind negative scores, different scales, or a layer whose attention sink takes 90 % of the mass, which
    would swamp a mean of the scores and flatten a mean of z-scores. Equal scores share their mean rank, so that
    tokens behind a sliding window are all alike to that layer.

    Args:
        scores_by_layer: float32 `[n]` per layer, at least one, all of one length and on one device.

    Returns:
        float32 `[n]` on that device, in (0, 1]; a token's rank in a layer is 1 / n for the lowest score and 1
        for the highest.

    Raises:
        InvalidArgumentError: there is no layer, or lengths differ.
    """
    lengths = {tuple(scores.shape) for scores in scores_by_layer}
    if len(lengths) != 1:
        raise InvalidArgumentError(f"scores of one length are combined; the layers have {sorted(lengths) or 'none'}")
    return torch.stack([_ranks(scores) for scores in scores_by_layer]).mean(dim=0)


def _ranks(scores: torch.Tensor) -> torch.Tensor:
    """Mean ranks, 1 / n … 1, as float32 `[n]`; ties share theirs."""
    _, group, sizes = torch.unique(scores, return_inverse=True, return_counts=True)
    mean_rank: torch.Tensor = sizes.cumsum(dim=0) - (sizes - 1) / 2
    return mean_rank[group] / scores.numel()
