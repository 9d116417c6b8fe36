"""How important each token's KV is, judged from what one layer shows while it runs the prompt.

A scorer takes one layer's `LayerCapture` and the request's seed, and returns a number per token; policies use
nothing of it but the order. Each scorer is one function, registered by name in `scorers`. Only `random` draws, so
only `random` looks at the seed.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.registry import Registry
from spectrumkv.kernels import attention_scores as kernels

SINK_TOKENS = 4
"""How many of the first tokens are attention sinks (StreamingLLM, arXiv 2309.17453, section 3.1): they draw attention
whatever they say, and their keys and values are unlike all others. SinkProtect and PDTrim keep as many, too."""

DECAY_RATE = 0.005
"""λ of `decay` and `position`, per token; the middle one of those that the paper sweeps (.001, .005, .01)."""


Scorer = Callable[[LayerCapture, int], torch.Tensor]
"""Maps a capture of n tokens and a seed to float32 `[n]` on the capture's device: finite, higher is better."""

scorers: Registry[Scorer] = Registry("scorer")


def mean_attention(capture: LayerCapture) -> torch.Tensor:
    """Average the attention that each token gets from the captured queries, over all heads.

    The mean runs over those queries that can see the token; see `spectrumkv.kernels.attention_scores`. Logits are
    computed in float32 whatever dtype the model has.

    Args:
        capture: of a layer.

    Returns:
        float32 `[n]` on the capture's device, from 0 to 1; 0 where a sliding window hides the token from every query.
    """
    return kernels.mean_attention(
        capture.queries, capture.keys, capture.scaling, capture.sliding_window, capture.softcap
    )


@scorers.register("attention")
def attention(capture: LayerCapture, seed: int) -> torch.Tensor:
    """Return mean attention over the layer's heads: the paper's attention statistic A."""
    return mean_attention(capture)


@scorers.register("decay")
def decay(capture: LayerCapture, seed: int) -> torch.Tensor:
    """Return attention that fades with distance: A_j · exp(−λ (n − j)) (SpectrumKV, Method), λ = `DECAY_RATE`.

    Tokens are counted j = 1 … n, so the last one keeps its whole score. Beyond about 100 / λ tokens the factor
    is 0 in float32; such tokens tie, and policies rank a tie by position.
    """
    return attention(capture, seed) * position(capture, seed)


@scorers.register("key_norm")
def key_norm(capture: LayerCapture, seed: int) -> torch.Tensor:
    """Return minus the mean L2 norm of the token's keys.

    The score itself needs no attention. Under the policy "spectral", the default, attention is computed all the
    same, since sensitivities were calibrated by it: the scorer says only which token gets the largest share of it,
    which the next largest, and so on.

    The paper names "KV norm" as the stand-in and says no more. Keys of low norm are those that draw attention
    (Devoto et al. 2024, "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", arXiv
    2406.11430), hence the sign. RoPE rotates and leaves norms as they are.
    """
    norms: torch.Tensor = torch.linalg.vector_norm(capture.keys, dim=-1, dtype=torch.float32)
    return -norms.mean(dim=0)


@scorers.register("position")
def position(capture: LayerCapture, seed: int) -> torch.Tensor:
    """Return exp(−λ (n − j)) alone, which is what the quality scripts released with the paper compute."""
    distance = torch.arange(capture.tokens - 1, -1, -1, dtype=torch.float32, device=capture.keys.device)
    return torch.exp(-DECAY_RATE * distance)


@scorers.register("random")
def random(capture: LayerCapture, seed: int) -> torch.Tensor:
    """Return uniform numbers in [0, 1), one draw per seed and layer: what every other scorer has to beat."""
    generator = np.random.default_rng((seed, capture.layer))
    return torch.from_numpy(generator.random(capture.tokens, dtype=np.float32)).to(capture.keys.device)


def combine(scores_by_layer: Sequence[torch.Tensor]) -> torch.Tensor:
    """Combine the layers' scores into one per token: the mean of its ranks in the layers.

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
    """Return mean ranks, 1 / n … 1, as float32 `[n]`; ties share theirs."""
    _, group, sizes = torch.unique(scores, return_inverse=True, return_counts=True)
    mean_rank: torch.Tensor = sizes.cumsum(dim=0) - (sizes - 1) / 2
    return mean_rank[group] / scores.numel()
