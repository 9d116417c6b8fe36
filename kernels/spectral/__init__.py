"""The loops of codec "spectral", compiled for CPUs; `spectrumkv.common.kv.codecs.spectral` says which, and with what.

Coding a segment runs them in this order:

1. `moments.add_moments` adds up some tokens' coefficients and their squares: the segment's own means and standard
   deviations.
2. `rate`: `finest_within` finds a layer's step, before any token is coded: the finest one whose expected bits fit the
   budget.
3. `packing.lay_out` chooses how each stream is packed, and `streams.offsets` where each row's integers start.
4. `transform.analyse` goes over the heads, 240 tokens at a time:
   `rows.gather_unrotated` (keys) or `rows.gather` (values) takes tokens by rising step class, centres them, and turns
   keys back by their rotary angles; `jit.gemm.transpose` and `multiply` give the coefficients in the basis;
   `streams.quantize` divides by the steps, rounds, most coefficients by the best path through a `trellis`, and sorts
   the integers into streams.
5. `packing.pack_streams` splits off raw bits and outliers of each stream and packs the rest, several to a byte. What
   it writes goes to the entropy coder (Zstandard, called from `codecs/spectral/symbols.py`).

Decoding runs the other way: `packing.lay_out`, then `packing.unpack_streams`, `streams.offsets`, and
`transform.synthesise`, which calls `streams.dequantize`, `jit.gemm.multiply`, and `rows.scatter_rotated` or
`rows.scatter`. Nothing is imported here, because all of it takes numba.

`reference` says the transform and the trellis in plain torch.
"""
