"""What codecs `spectral` and `fixed_rate` share: the calibrated basis, the importance of tokens, and the sinks.

Both send the coefficients of every token within a budget of counted bytes, and the first tokens, the sinks, without
the transform in the 16-bit dtype. `basis` has the transform, `layer` what it says of one layer, `importance` each
token's step relative to the others, `request` what an encoder is told of one prompt, `sinks` the first tokens, and
`codec` what both codecs state alike.
"""
