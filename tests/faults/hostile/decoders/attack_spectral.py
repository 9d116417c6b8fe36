"""The spectral decoder alone, given bodies made to do harm, thousands a minute.

`python -m tests.faults.hostile.decoders.attack_spectral 2000 7` makes 2,000 attempts, seed 7. With
NUMBA_BOUNDSCHECK=1 compiled loops raise IndexError where they would read or write beyond an array; numba's cache does
not tell the two apart, so that needs a cache directory of its own.
"""

import random
import sys
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from functools import cache

import numpy as np
import torch

from spectrumkv.common.errors import DataLossError
from spectrumkv.common.kv.codecs.calibrated.basis import CalibratedBasis
from spectrumkv.common.kv.codecs.spectral.codec import SpectralDecoder
from spectrumkv.common.kv.codecs.spectral.transform import LayerTransform
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.segment import KvSegment
from spectrumkv.kernels.spectral import packing as spectral_packing
from tests.common.kv.codecs.spectral_prompts import basis_of
from tests.faults.hostile.bodies import BODY_HARMS, harm_body
from tests.faults.hostile.dialogue import spectral_segments
from tests.faults.hostile.spectral_body import SpectralBody, taken_apart, with_body

GEOMETRY = KvGeometry(layers=2, kv_heads=2, head_dim=16, native_dtype=torch.float32)
LONGEST_PROMPT = 40
# Slots on either side of the request's own, which belong to others.
MARGIN = 50
UNTOUCHED = 7.0
HARMS_AT_MOST = 3


@cache
def basis() -> CalibratedBasis:
    return basis_of(GEOMETRY)


def attack(attempts: int, seed: int) -> Counter[str]:
    """Decode harmed bodies; return how often which kind of harm was tried, and how many were decoded all the same.

    Raises:
        AssertionError: a slot beside the request's own was written.
        IndexError: a compiled loop left its array, where bounds are checked.
    """
    chance = random.Random(seed)
    decoder = SpectralDecoder(basis(), GEOMETRY)
    sound = sound_segments(chance)
    tried: Counter[str] = Counter(dict.fromkeys(BODY_HARMS, 0))
    for _ in range(attempts):
        segment, parts = chance.choice(sound)
        body = deepcopy(parts)
        for _ in range(chance.randint(1, HARMS_AT_MOST)):
            tried[harm_body(chance, body)] += 1
        slots = torch.full((2, GEOMETRY.kv_heads, segment.tiers.numel() + 2 * MARGIN, GEOMETRY.head_dim), UNTOUCHED)
        keys, values = slots[:, :, MARGIN:-MARGIN]
        try:
            decoder.decode(with_body(segment, body.assembled()), keys, values)
            tried["decoded"] += 1
        except DataLossError as error:
            tried[f"refused: {error.reason}"] += 1
        assert (slots[:, :, :MARGIN] == UNTOUCHED).all()
        assert (slots[:, :, -MARGIN:] == UNTOUCHED).all()
    return tried


def sound_segments(chance: random.Random) -> list[tuple[KvSegment, SpectralBody]]:
    """Segments of prompts of all lengths at random steps, and their bodies in parts."""
    found = []
    for tokens in range(1, LONGEST_PROMPT + 1):
        for segment in spectral_segments(chance, GEOMETRY, basis(), tokens):
            transform, data = LayerTransform.of_layers(basis())[segment.layer], segment.body.numpy().tobytes()
            body = taken_apart(data, segment.tiers.numel(), transform, GEOMETRY)
            assert body.assembled() == data
            found.append((segment, body))
    return found


def bounds_are_checked() -> bool:
    """Whether a compiled loop that is given too short an array says so."""
    symbols, nothing = np.zeros(100, np.int32), np.zeros(0, np.uint32)
    try:
        spectral_packing.join(symbols, 0, 8, nothing, np.zeros((0, 2), np.int32))
    except IndexError:
        return True
    return False


def main(attack: Callable[[int, int], Counter[str]], attempts: str, seed: str) -> None:
    """Attack with bounds checked, and write what came of it."""
    assert bounds_are_checked(), "run with NUMBA_BOUNDSCHECK=1 and a fresh NUMBA_CACHE_DIR"
    tried = attack(int(attempts), int(seed))
    sys.stdout.write(f"{attempts} bodies with bounds checked, seed {seed}: {dict(tried)}\n")


if __name__ == "__main__":
    main(attack, *sys.argv[1:])
