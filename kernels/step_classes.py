"""The step classes of tokens: how fine a token's coefficients are, relative to the mean token of its layer.

Codecs `spectral` and `fixed_rate` have them on the wire. A class is half an octave, and a higher one is coarser.
"""

CLASSES_PER_OCTAVE = 2
# Six octaves finer than the mean token, one and a half coarser.
LOWEST_CLASS, HIGHEST_CLASS = -12, 3
# The encoders' coarsest one: a token that nothing looked at may be looked at later, and is coded as if it were worth
# a little less than the mean one.
COARSEST_CLASS = 1
