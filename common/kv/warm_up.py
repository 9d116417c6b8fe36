"""Codes a little KV at start on a GPU, so that what Triton compiles for a model is compiled before the first request.

Triton compiles at a kernel's first launch, for the dtypes, the strides' divisors and the constants of that call. A
prompt of the model has them all, however short it is.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch

from spectrumkv.common.kv.allocation import Int4Layers
from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.kv.codecs.encoder_request import EncoderRequest
from spectrumkv.common.kv.codecs.fixed_rate.self_check import check_decoding, check_encoding
from spectrumkv.common.kv.codecs.tiered import tier_codecs
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.policies import policies
from spectrumkv.common.kv.tiers import Tier

# Tokens that decode writes once, as few as all tiers need.
TRIAL_TOKENS = 16


def encode_once(captures: Sequence[LayerCapture], geometry: KvGeometry) -> None:
    """Score, tier and code layers by every codec of tiers and by fixed_rate, and drop what comes out.

    Codecs of tiers do so with scores and without.

    Args:
        captures: layers of one prompt, on a GPU, that differ in what kernels are compiled for: one is enough where
            all are alike.
        geometry: shape and dtype of the model's cache.
    """
    for codec in tier_codecs().values():
        written = [one for one in map(policies.get, policies) if one.rule is not None and codec.writes(one)]
        for policy in {one.needs_scores: one for one in written}.values():
            request = EncoderRequest(
                policy=policy,
                budget=policy.budget(policy.min_budget),
                scorer="attention",
                scope="layer",
                int4=Int4Layers(),
                seed=0,
                geometry=geometry,
                tokens=captures[0].tokens,
            )
            encoder = codec.encoder(request)
            for capture in captures:
                for _ in encoder.encode(capture):
                    pass
    check_encoding(captures, geometry)


def decode_once(slots: Sequence[tuple[torch.Tensor, torch.Tensor]], geometry: KvGeometry) -> None:
    """Write into slots by fixed_rate, and zeros by every codec of tiers at all of its tiers.

    Args:
        slots: keys and values of one or two layers, each `[kv_heads, TRIAL_TOKENS, head_dim]` in the model's own
            dtype, views of slots that nobody holds.
        geometry: shape and dtype of the model's cache.
    """
    check_decoding(slots, geometry)
    keys, values = slots[0]
    states = torch.zeros(keys.shape, dtype=geometry.native_dtype)
    for codec in tier_codecs().values():
        tiers = sorted(codec.tiers - {Tier.DROP})
        bounds = [TRIAL_TOKENS * number // len(tiers) for number in range(len(tiers) + 1)]
        of_tokens = torch.empty(TRIAL_TOKENS, dtype=torch.uint8)
        for tier, (first, end) in zip(tiers, pairwise(bounds), strict=True):
            of_tokens[first:end] = tier
        body = codec.encode(states, states, of_tokens, geometry).body
        codec.decode(body, of_tokens, keys, values, geometry)
