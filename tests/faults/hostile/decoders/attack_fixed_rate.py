"""The fixed-rate decoder alone, given bodies made to do harm, thousands a minute.

`python -m tests.faults.hostile.decoders.attack_fixed_rate 2000 7` makes 2,000 attempts, seed 7. It wants
NUMBA_BOUNDSCHECK=1 and a cache directory of its own, as `attack_spectral` does.
"""

import random
import sys
from collections import Counter
from functools import cache

import torch

from spectrumkv.common.errors import DataLossError
from spectrumkv.common.kv.codecs.calibrated.request import CalibratedRequest
from spectrumkv.common.kv.codecs.fixed_rate.codec import FixedRateDecoder
from spectrumkv.common.kv.codecs.fixed_rate.encoder import FixedRateEncoder
from spectrumkv.common.kv.codecs.fixed_rate.segment_codec import HEADER
from spectrumkv.common.kv.segment import KvSegment
from tests.common.kv.codecs.spectral_prompts import capture
from tests.faults.hostile.decoders.attack_spectral import GEOMETRY, MARGIN, UNTOUCHED, basis, main

LENGTHS = (1, 2, 5, 17, 40, 90)
BUDGETS = (0.1, 0.3, 0.8)
HARMS = ("byte", "header", "cut", "longer", "swapped", "record length")
TELLING = (0, 1, 2, 255, 256, 32767, 32768, 65535)
HARMS_AT_MOST = 3


@cache
def sound_segments() -> tuple[KvSegment, ...]:
    """Segments of prompts of several lengths, at several budgets."""
    found = []
    for tokens in LENGTHS:
        for budget in BUDGETS:
            segment_bytes = int(budget * GEOMETRY.fp16_bytes(tokens))
            encoder = FixedRateEncoder(CalibratedRequest(basis(), GEOMETRY, tokens, segment_bytes, "attention", 0))
            for layer in range(GEOMETRY.layers):
                found += encoder.encode(capture(basis(), layer, tokens))
    return tuple(found)


def harm(chance: random.Random, kind: str, body: bytearray) -> None:
    """Change a body in place."""
    at = chance.randrange(len(body))
    if kind == "byte":
        body[at] = chance.randrange(256)
    elif kind == "header":
        field = 2 * chance.randrange(HEADER.size // 2)
        body[field : field + 2] = chance.choice(TELLING).to_bytes(2, "little")
    elif kind == "cut":
        del body[max(1, at) :]
    elif kind == "longer":
        body += chance.randbytes(chance.choice((1, 2, 4, 4096)))
    elif kind == "swapped":
        other = chance.randrange(len(body))
        body[at], body[other] = body[other], body[at]
    else:
        # As many words more or less as another width of a group takes.
        words = 4 * chance.randrange(1, 14)
        body[at:at] = bytes(words) if chance.random() < 0.5 else b""
        del body[-words:]


def attack(attempts: int, seed: int) -> Counter[str]:
    """Decode harmed bodies; return how often which kind of harm was tried, and how many were decoded all the same.

    Raises:
        AssertionError: a slot beside the request's own was written.
        IndexError: a compiled loop left its array, where bounds are checked.
    """
    chance, decoder = random.Random(seed), FixedRateDecoder(basis(), GEOMETRY)
    tried: Counter[str] = Counter(dict.fromkeys(HARMS, 0))
    for _ in range(attempts):
        segment = chance.choice(sound_segments())
        body = bytearray(segment.body.numpy().tobytes())
        for _ in range(chance.randint(1, HARMS_AT_MOST)):
            kind = chance.choice(HARMS)
            harm(chance, kind, body)
            tried[kind] += 1
            if not body:
                body.append(0)
        slots = torch.full((2, GEOMETRY.kv_heads, segment.tiers.numel() + 2 * MARGIN, GEOMETRY.head_dim), UNTOUCHED)
        keys, values = slots[:, :, MARGIN:-MARGIN]
        harmed = KvSegment(
            segment.layer, segment.first_token, segment.tiers, torch.frombuffer(body, dtype=torch.uint8)
        )
        try:
            decoder.decode(harmed, keys, values)
            tried["decoded"] += 1
        except DataLossError as error:
            tried[f"refused: {error.reason}"] += 1
        assert (slots[:, :, :MARGIN] == UNTOUCHED).all()
        assert (slots[:, :, -MARGIN:] == UNTOUCHED).all()
    return tried


if __name__ == "__main__":
    main(attack, *sys.argv[1:])
