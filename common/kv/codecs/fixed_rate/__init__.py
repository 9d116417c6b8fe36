"""Codec "fixed_rate": transform coding of keys and values with records whose length is decided by integers alone.

It codes in the basis of codec "spectral", by the same importance of tokens, and has no entropy coder. A token's
record has so many bits for each group of coefficients as their standard deviation asks for beside the token's step.
What makes up for the entropy coder is sent beside the records: each coefficient's standard deviation and mean in this
prompt, and each token's gain. A few coefficients that lie far outside are sent as they are.

`statistics` finds standard deviations, means and gains, `segment_codec` makes a segment's body of tokens and back,
`rate` decides how fine the steps are within a budget, `encoder` goes through a prompt's layers, and `codec` states
encoder and decoder. The records are the kernels' (`spectrumkv.kernels.fixed_rate`).
"""

from spectrumkv.common.kv.codecs.fixed_rate.codec import FixedRateCodec

__all__ = ["FixedRateCodec"]
