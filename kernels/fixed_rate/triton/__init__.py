"""Codec fixed_rate on GPUs: three launches from a layer's states to the bodies of its segments, two back into slots.

`encode` and `decode` are called by the codec, on tensors of the GPU; the kernels behind them each have a module.

Encoding: `analysis` makes coefficients. `statistics` finds gains, standard deviations, the order of rows, the base
and where records start; what needs all programs' results is done by the program that finishes last. `packing` writes
records, and the program that finishes a segment last its escapes. Every sum has one order and nothing is placed by
who comes first, so that the same layer makes the same bytes. Decoding: `unpacking` makes coefficients of records,
`synthesis` makes keys and values of those.
"""
