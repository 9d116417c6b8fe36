"""The codec "spectral" and the policy of its name."""

import numpy as np
import torch

from spectrumkv.common.kv.codecs.base import SegmentDecoder, codecs, needed_basis
from spectrumkv.common.kv.codecs.spectral.basis import SpectralBasis
from spectrumkv.common.kv.codecs.spectral.decoder import SpectralDecoder
from spectrumkv.common.kv.codecs.spectral.rate import RateControl
from spectrumkv.common.kv.codecs.spectral.segment_codec import UncodedSegment, decode_segment, encode_segment
from spectrumkv.common.kv.codecs.spectral.steps import TokenClasses
from spectrumkv.common.kv.codecs.spectral.transform import layer_transforms
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.policies.base import Policy, policies
from spectrumkv.common.kv.tiers import Tier


class SpectralCodec:
    """Transform coding within a budget of counted bytes; see `Codec`. `SpectralEncoder` is its sending half."""

    name = "spectral"
    version = 2
    tiers = frozenset({Tier.INT4, Tier.INT8, Tier.FP16})
    needs_basis = True

    def decoder(self, geometry: KvGeometry, basis: SpectralBasis | None) -> SegmentDecoder:
        """See `Codec.decoder`."""
        return SpectralDecoder(needed_basis(self, basis), geometry)


codecs.register(SpectralCodec.name)(SpectralCodec())
policies.register(SpectralCodec.name)(
    Policy("spectral", min_budget=0.05, max_budget=1.0, codec="spectral", needs_scores=True, rule=None)
)


def prepare() -> None:
    """Compile what runs on CPUs, so that no request waits for it.

    It takes seconds where this machine never did, and a fraction of one where compiled code is in the cache.
    """
    heads, head_dim = 2, 4
    geometry = KvGeometry(1, heads, head_dim, torch.float32)
    lead = (1, 2, heads)
    basis = SpectralBasis(
        mean=torch.zeros(*lead, head_dim),
        analysis=torch.eye(head_dim).expand(*lead, -1, -1).contiguous(),
        spread=torch.ones(*lead, head_dim),
        attention_exponent=torch.ones(1),
        rope_frequencies=torch.ones(head_dim // 2, dtype=torch.float64),
        rope_scaling=1.0,
    )
    (transform,) = layer_transforms(basis)
    # A lone token's keys lie in one piece, those of several do not.
    for tokens in (3, 1):
        # As models leave keys, token by token, and as slots lie, head by head in something larger.
        sent, received = torch.ones(tokens, heads, head_dim).transpose(0, 1), torch.zeros(heads, 2 * tokens, head_dim)
        classes = TokenClasses(np.zeros(tokens, np.int64), sinks=tokens // 2)
        body, _ = encode_segment(UncodedSegment(transform, 0, sent, sent, classes), 0.0, geometry)
        slots = received[:, tokens:]
        decode_segment(transform, memoryview(body), 0, geometry, slots, slots)
        transform.mean_bits(classes.classes.astype(np.float64))
        rate = RateControl(budget_bytes=1, basis=basis)
        rate.expected_bytes(classes.classes, rate.base(classes.classes, 0), 0)
