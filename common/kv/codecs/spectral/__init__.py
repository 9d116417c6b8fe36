"""Codec "spectral": transform coding of keys and values with a step per token.

Keys and values are turned into coefficients by a basis that a short calibration finds for each model: the
Karhunen-Loève transform in the metric of the model's own sensitivity, the Fisher information of what it predicts with
respect to its KV. A coefficient is rounded to a multiple of its token's step, important tokens have small steps, and
the integers go to an entropy coder in streams of equal standard deviation. With one step for all coefficients of a
token, every coefficient gets the same distortion as long as its variance is above it: reverse water-filling (Cover &
Thomas, "Elements of Information Theory", section 13.3.3 of the first edition, 10.3.3 of the second).

`calibrated.importance` decides each token's step relative to the others, `coefficients` what a segment's
coefficients are like, `rate` how fine all are together, `layout` which symbols share a stream, `transform` makes
symbols of tokens, `symbols` makes bytes of symbols, `segment_codec` makes a segment's body of all that, `encoder`
goes through a prompt's layers, `tiers` names the tier that each token comes nearest to, and `codec` states encoder
and decoder. `tier_allocation` gives whole tiers by the same importance, for a codec that needs no basis.
"""

from spectrumkv.common.kv.codecs.spectral.codec import SpectralCodec

__all__ = ["SpectralCodec"]
