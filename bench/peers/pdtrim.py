"""Prune as PDTrim does: keep first and last tokens in selected layers, and every token in the others.

PDTrim (Zhang et al. 2025, arXiv 2509.04467v3) keeps the whole KV cache on the prefill side and lets decode reuse
"entries for the first and last token sequences in selected layers". The policy `pdtrim` of `common.kv` is the
SpectrumKV paper's version; this module follows the original idea. It leaves out PDTrim's removal of model blocks,
which changes the model, and PDTrim's choice of layers, which is fixed once per model.
"""

from dataclasses import dataclass
from math import ceil, floor

import torch

from spectrumkv.bench.methods.method import Prompt, SentBytes, store_fp16
from spectrumkv.bench.peers.baselines import baseline
from spectrumkv.common.kv.scoring import SINK_TOKENS, attention
from spectrumkv.decode_server.kv_pool import Allocation, KvPool

# These settings were chosen on the default model and the first half of WikiText-2 (1,792 + 256 tokens, budgets 0.5
# and 0.3). Results are better the more layers are trimmed, so only one layer in thirty is spared. One first token to
# seven last ones is better than one to three, and as good as four first ones.
SPARED_LAYERS = 1 / 30
FIRST_SHARE = 1 / 8


@dataclass(frozen=True)
class Trim:
    """Say which layers are trimmed, and to which tokens.

    Attributes:
        layers: the trimmed layers.
        first: tokens kept at the start of each trimmed layer.
        last: tokens kept at the end of each trimmed layer.
        lost: share of the observed attention that goes to dropped tokens, summed over the trimmed layers.
    """

    layers: tuple[int, ...]
    first: int
    last: int
    lost: float


@baseline("pdtrim-layers", codec="fp16", min_budget=0.01, max_budget=1.0)
def pdtrim_layers(prompt: Prompt, pool: KvPool, allocation: Allocation, budget: float) -> SentBytes:
    """Trim the layers that lose the least observed attention by it, and spare those that attend most to the middle.

    The choice by prompt favours the method over PDTrim's, which is made once per model. Kept tokens are FP16. Bytes:
    16 bits for each kept element.

    Returns:
        The counted bytes and the tier budget.
    """
    layers, tokens = prompt.captured.layers, len(prompt.token_ids)
    trim = best_trim(torch.stack([attention(layer, 0) for layer in layers]), budget)
    kept = 0
    for layer in layers:
        store_fp16(allocation, layer.layer, layer.keys, layer.values, pool.geometry)
        if layer.layer in trim.layers:
            allocation.drop(layer.layer, torch.arange(trim.first, tokens - trim.last))
            kept += trim.first + trim.last
        else:
            kept += tokens
    return SentBytes(pool.geometry.fp16_bytes_per_layer(kept), kept / (tokens * len(layers)))


def best_trim(observed: torch.Tensor, budget: float) -> Trim:
    """Return the trim that uses a budget.

    Args:
        observed: `[layers, n]`, the attention that each token receives.
        budget: share of the token-layers that may be kept, at most 1.
    """
    layers, tokens = observed.shape
    dropped = (1 - budget) * layers * tokens
    if dropped < 1:
        return Trim((), tokens, 0, 0.0)
    # A trimmed layer keeps at least one token, so small budgets leave no layer to spare.
    fewest = min(layers, ceil(dropped / (tokens - 1)))
    count = max(fewest, layers - max(1, round(layers * SPARED_LAYERS)))
    kept = max(1, floor(tokens - dropped / count + 1e-9))
    first = min(kept - 1, max(SINK_TOKENS, round(kept * FIRST_SHARE)))
    share = (observed / observed.sum(dim=1, keepdim=True)).double().cpu()
    lost = share[:, first : tokens - (kept - first)].sum(dim=1)
    chosen = lost.argsort()[:count]
    return Trim(tuple(sorted(chosen.tolist())), first, kept - first, float(lost[chosen].sum()))
