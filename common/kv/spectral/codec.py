"""The codec "spectral" and the policy of its name."""

from spectrumkv.common.kv.codec import BlockDecoder, codecs, needed_basis
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.spectral.basis import SpectralBasis
from spectrumkv.common.kv.spectral.decoder import SpectralDecoder
from spectrumkv.common.kv.tiering import Policy, policies
from spectrumkv.common.kv.tiers import Tier


class SpectralCodec:
    """Transform coding within a budget of counted bytes; see `Codec`. `SpectralEncoder` is its sending half."""

    name = "spectral"
    version = 1
    tiers = frozenset({Tier.INT4, Tier.INT8, Tier.FP16})
    needs_basis = True

    def decoder(self, geometry: KvGeometry, basis: SpectralBasis | None) -> BlockDecoder:
        """See `Codec.decoder`."""
        return SpectralDecoder(needed_basis(self, basis), geometry)


codecs.register(SpectralCodec.name)(SpectralCodec())
policies.register(SpectralCodec.name)(
    Policy("spectral", min_budget=0.05, max_budget=1.0, codec="spectral", needs_scores=True, rule=None)
)
