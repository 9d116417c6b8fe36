"""What kernels share: powers of two and logarithms that are bit for bit those of the host, widths, and bits."""

import triton.language as tl

from spectrumkv.kernels import step_classes
from spectrumkv.kernels.fixed_rate import layout
from spectrumkv.kernels.triton_shared import ROUNDER, jit

GROUP_ROWS = tl.constexpr(layout.GROUP_ROWS)
LOWEST_CLASS, COARSEST_CLASS = tl.constexpr(step_classes.LOWEST_CLASS), tl.constexpr(step_classes.COARSEST_CLASS)
LOWEST_GAIN, HIGHEST_GAIN = tl.constexpr(layout.LOWEST_GAIN), tl.constexpr(layout.HIGHEST_GAIN)
LOWEST_PROFILE = tl.constexpr(layout.LOWEST_PROFILE)
# Profiles, padded to a power of two.
PADDED_PROFILES = tl.constexpr(1 << (layout.PROFILES - 1).bit_length())
WIDEST = tl.constexpr(layout.WIDEST)
# Units of a ratio per unit of a profile and of a base.
PROFILE_RATIO = tl.constexpr(layout.RATIO_UNITS // layout.PROFILE_UNITS)
BASE_RATIO = tl.constexpr(layout.RATIO_UNITS // layout.BASE_UNITS)
MANTISSA_BITS, EXPONENT_BIAS = tl.constexpr(23), tl.constexpr(127)
MANTISSA_MASK = tl.constexpr((1 << 23) - 1)


@jit
def power_of_two(eighths: tl.tensor, table_ptr: tl.tensor) -> tl.tensor:
    """Return 2^(eighths / 8) as float32, rounded correctly: the host's `np.exp2`, and no approximation of a GPU's.

    `table_ptr` has the powers from 0 to 7 eighths.
    """
    fraction = tl.load(table_ptr + (eighths & 7))
    whole = ((eighths >> 3) + EXPONENT_BIAS) << MANTISSA_BITS
    return fraction * whole.to(tl.float32, bitcast=True)


@jit
def exponent_of(std: tl.tensor, borders_ptr: tl.tensor) -> tl.tensor:
    """Return binary logarithms of positive float32 in eighths, rounded; see `layout.exponents_of`."""
    bits = std.to(tl.int32, bitcast=True)
    mantissa = bits & MANTISSA_MASK
    eighths = ((bits >> MANTISSA_BITS) - EXPONENT_BIAS) << 3
    for border in tl.static_range(8):
        eighths += (mantissa >= tl.load(borders_ptr + border)).to(tl.int32)
    return eighths


@jit
def width_of(ratio: tl.tensor, thresholds_ptr: tl.tensor) -> tl.tensor:
    """Return the bits of coefficients by the ratio of standard deviation to step; see `RecordLayout.widths`."""
    width = tl.zeros_like(ratio)
    for bits in tl.static_range(WIDEST):
        width += (ratio > tl.load(thresholds_ptr + bits)).to(tl.int32)
    return width


@jit
def trellis_choices(odd: tl.tensor) -> tl.tensor:
    """Return bit a of the trellis before each row of groups, bit i for row i; see `reference.choices`.

    `odd` is int32, a bit for each row that says whether its integer is odd. Before each row a is the xor of every
    second bit of those below.
    """
    word = odd << 1
    word ^= word << 2
    word ^= word << 4
    word ^= word << 8
    return word ^ (word << 16)


@jit
def rounded(values: tl.tensor, least: tl.constexpr, most: tl.constexpr) -> tl.tensor:
    """Return the nearest int32 between two bounds, halves to even; NaN becomes the lower one."""
    bounded = tl.minimum(tl.maximum(tl.where(values == values, values, least), least), most)
    return ((bounded + ROUNDER) - ROUNDER).to(tl.int32)


@jit
def count_bits(words: tl.tensor) -> tl.tensor:
    """Return how many ones each uint32 has, as int32 (Warren 2012, "Hacker's Delight", section 5-1)."""
    pairs = words - ((words >> 1) & 0x55555555)
    fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    eights = (fours + (fours >> 4)) & 0x0F0F0F0F
    sixteens = eights + (eights >> 8)
    return ((sixteens + (sixteens >> 16)) & 63).to(tl.int32)


@jit
def is_last(counter_ptr: tl.tensor, programs: tl.tensor) -> tl.tensor:
    """Return whether all other programs that share a counter have been here, and see what they wrote.

    The counter is 0 at the launch. The barrier has all threads' stores precede the one that counts.
    """
    tl.debug_barrier()
    arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel")
    tl.debug_barrier()
    return arrived == programs - 1
