"""Spectral bodies that no honest encoder writes: each field of a sound one made to lie, one kind of lie at a time."""

import math
import random
import struct
from collections.abc import Callable
from functools import cache

import numpy as np
import zstandard

from spectrumkv.common.kv.codecs.calibrated.basis import CalibratedBasis
from spectrumkv.common.kv.codecs.spectral.coefficients import MOST_CLASSES, ZERO
from spectrumkv.common.kv.codecs.spectral.layout import STEP_CLASSES
from spectrumkv.common.kv.codecs.spectral.symbols import EXCEPTION, compress
from spectrumkv.common.kv.codecs.spectral.transform import LayerTransform
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.segment import parse_segment
from tests.faults.hostile.spectral_body import SpectralBody, serialized, taken_apart, with_body

EDGES = (0, 1, 2, 3, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1)
BASES = (0.0, -0.0, 64.0, -64.0, 64.00001, -65.0, 1e38, -1e38, math.inf, -math.inf, math.nan, 1e-45)
BOMB_BYTES = 64 << 20
# float16 NaN and infinities.
HALVES = (b"\xff\x7f", b"\x00\x7e", b"\x00\x7c", b"\x00\xfc")
MANY_EXCEPTIONS = 20_000

BodyHarm = Callable[[random.Random, SpectralBody], None]


def harm_body(chance: random.Random, body: SpectralBody) -> str:
    """Harm a body; return the kind of harm. Often the lengths agree afterwards, so that the harm is what is found."""
    kind = chance.choice(list(BODY_HARMS))
    BODY_HARMS[kind](chance, body)
    if kind not in LIES_ABOUT_LENGTHS and chance.random() < 0.8:
        body.make_lengths_agree()
    return kind


def harm_payload(chance: random.Random, payload: bytes, basis: CalibratedBasis, geometry: KvGeometry) -> bytes:
    """Harm the body of one segment of a chunk; the segment's header says how long it is then.

    Raises:
        DataLossError: the payload is not sound as it is.
    """
    segment, offset = parse_segment(payload, 0)
    segments = [segment]
    while offset < len(payload):
        segment, offset = parse_segment(payload, offset)
        segments.append(segment)
    place = chance.randrange(len(segments))
    segment = segments[place]
    transform = LayerTransform.of_layers(basis)[segment.layer]
    body = taken_apart(segment.body.numpy().tobytes(), segment.tiers.numel(), transform, geometry)
    harm_body(chance, body)
    segments[place] = with_body(segment, body.assembled())
    return serialized(segments)


def _base(chance: random.Random, body: SpectralBody) -> None:
    near = body.base + chance.choice((-1, 1)) * chance.choice((1e-6, 0.5, 1.0, 3.0, 40.0))
    body.base = chance.choice((near, near, chance.choice(BASES)))


def _sinks(chance: random.Random, body: SpectralBody) -> None:
    body.sinks = max(0, chance.choice((body.sinks - 1, body.sinks + 1, *EDGES)))


def _class_bytes(chance: random.Random, body: SpectralBody) -> None:
    body.class_bytes = max(0, chance.choice((body.class_bytes + chance.choice((-1, 1)), *EDGES)))


def _classes(chance: random.Random, body: SpectralBody) -> None:
    """Other classes, some of which do not exist, and another number of them."""
    count = max(0, len(body.classes) + chance.choice((-2, -1, 0, 0, 0, 1, 5, 70_000)))
    kinds = chance.choice((len(STEP_CLASSES), len(STEP_CLASSES) + 1, 128, 255))
    classes = np.frombuffer(chance.randbytes(count), np.uint8) % np.uint8(kinds)
    body.classes = chance.choice((compress(classes), classes.tobytes()))


def _coded_classes(chance: random.Random, body: SpectralBody) -> None:
    body.classes = _harmed_code(chance, body.classes)


def _deviation_bytes(chance: random.Random, body: SpectralBody) -> None:
    near = body.deviation_bytes + chance.choice((-1, 1))
    body.deviation_bytes = max(0, chance.choice((near, 0, *EDGES)))


def _deviation(chance: random.Random, body: SpectralBody) -> None:
    """A deviation where there was none, another one, one of classes that are not allowed, or none."""
    rows = chance.choice((body.rows, body.rows, body.rows, body.rows + 1, 0))
    classes = [chance.choice((ZERO, ZERO + chance.randint(-MOST_CLASSES, MOST_CLASSES))) for _ in range(rows)]
    if classes and chance.random() < 0.3:
        classes[chance.randrange(rows)] = chance.randrange(256)
    levels = np.array([*classes, *chance.randbytes(rows)], np.uint8)
    coded = chance.choice((compress(levels), levels.tobytes()))
    body.deviation = chance.choice((coded, coded, coded, b"", _harmed_code(chance, coded)))


def _exact(chance: random.Random, body: SpectralBody) -> None:
    exact = bytearray(body.exact)
    for _ in range(chance.choice((1, 30))):
        at = chance.randrange(len(exact) // 2 + 1) * 2
        exact[at : at + 2] = chance.choice((*HALVES, b"", chance.randbytes(2)))
    body.exact = bytes(exact)


def _lengths(chance: random.Random, body: SpectralBody) -> None:
    """A lie about one frame or about the exceptions, or bytes that change hands between the two."""
    kind = chance.randrange(4)
    if kind == 0:
        body.exception_count = chance.choice((body.exception_count + 1, max(0, body.exception_count - 1), *EDGES))
    if not body.lengths or kind == 0:
        return
    place = chance.randrange(len(body.lengths))
    if kind == 1:
        body.lengths[place] = chance.choice((max(0, body.lengths[place] + chance.choice((-1, 1))), *EDGES))
    elif kind == 2:
        # As many bytes as before, taken for something else.
        body.lengths[place] = max(0, body.lengths[place] - EXCEPTION.itemsize)
        body.exception_count += 1
    else:
        del body.lengths[place]


def _gap_bytes(chance: random.Random, body: SpectralBody) -> None:
    """Another length of gaps than there are, and gaps that leave their stream."""
    if not body.gap_bytes:
        return
    place = chance.randrange(len(body.gap_bytes))
    length = chance.choice((max(0, body.gap_bytes[place] + chance.choice((-1, 1))), *EDGES))
    body.gap_bytes[place] = length
    if length < MANY_EXCEPTIONS and body.frames:
        gaps = np.frombuffer(chance.choice((chance.randbytes(length), b"\xfc" * length)), np.uint8)
        body.frames[min(place, len(body.frames) - 1)] = chance.choice((compress(gaps), gaps.tobytes()))


def _code(chance: random.Random, body: SpectralBody) -> None:
    if body.frames:
        place = chance.randrange(len(body.frames))
        body.frames[place] = _harmed_code(chance, body.frames[place])


def _raw(chance: random.Random, body: SpectralBody) -> None:
    size = max(0, len(body.raw) + chance.choice((-1, 0, 0, 1, 1000)))
    body.raw = chance.choice((chance.randbytes(size), b"\xff" * size, bytes(size)))


def _exceptions(chance: random.Random, body: SpectralBody) -> None:
    """Indices beyond the segment, twice the same or out of order, values at the edges, very many."""
    count = chance.choice((1, 1, 2, 3, 50, MANY_EXCEPTIONS))
    made = np.empty(count, EXCEPTION)
    made["index"] = chance.choice((chance.randrange(200), *EDGES))
    if chance.random() < 0.3:
        made["index"] = np.arange(count)
    made["value"] = chance.choice((0, 1, -1, 2**31 - 1, -(2**31), chance.randrange(-(2**31), 2**31)))
    body.exceptions = chance.choice((b"", body.exceptions)) + made.tobytes()


def _frames(chance: random.Random, body: SpectralBody) -> None:
    """A frame lost, twice, or in another's place."""
    if not body.frames:
        return
    place = chance.randrange(len(body.frames))
    kind = chance.randrange(3)
    if kind == 0:
        del body.frames[place]
    elif kind == 1:
        body.frames.insert(place, body.frames[place])
    else:
        chance.shuffle(body.frames)


def _end(chance: random.Random, body: SpectralBody) -> None:
    body.end = chance.choice((b"\0", b"\xff", bytes(2), bytes(3), chance.randbytes(1000)))


BODY_HARMS: dict[str, BodyHarm] = {
    "base": _base,
    "sinks": _sinks,
    "length of classes": _class_bytes,
    "classes": _classes,
    "coded classes": _coded_classes,
    "length of deviation": _deviation_bytes,
    "deviation": _deviation,
    "sinks' states": _exact,
    "lengths of frames": _lengths,
    "lengths of gaps": _gap_bytes,
    "coded symbols": _code,
    "raw bits": _raw,
    "exceptions": _exceptions,
    "order of frames": _frames,
    "end": _end,
}
LIES_ABOUT_LENGTHS = frozenset({"length of classes", "length of deviation", "lengths of frames"})


def _harmed_code(chance: random.Random, coded: bytes) -> bytes:
    """Entropy-coded bytes that are damaged, or were made to do harm."""
    kind = chance.randrange(8)
    if kind == 0:
        return b""
    if kind == 1:
        return bytes((chance.choice((1, 2, 3, 127, 255)),)) + coded[1:]
    if kind == 2:
        return coded + chance.choice((b"\0", b"\xff" * 9, chance.randbytes(300)))
    if kind == 3:
        return coded[: chance.randrange(len(coded) + 1)]
    if kind == 4 and len(coded) > 1:
        changed = bytearray(coded)
        for _ in range(chance.choice((1, 1, 5))):
            changed[chance.randrange(1, len(changed))] ^= 1 << chance.randrange(8)
        return bytes(changed)
    if kind == 5:
        return chance.choice(lying_frames())
    return chance.choice(bombs())


@cache
def bombs() -> tuple[bytes, ...]:
    """A few kilobytes each that unpack to 64 MiB, or to nothing in very many blocks of Zstandard."""
    parameters = zstandard.ZstdCompressionParameters.from_level(
        1, format=zstandard.FORMAT_ZSTD1_MAGICLESS, write_content_size=False, write_checksum=False
    )
    zeros = zstandard.ZstdCompressor(compression_params=parameters).compress(bytes(BOMB_BYTES))
    frame = b"\x00\x48"
    # A block's header in Zstandard: last or not, kind (0 raw, 1 one byte again and again), size.
    runs = b"".join((size << 3 | 1 << 1).to_bytes(3, "little") + b"\7" for size in [1 << 17] * 500)
    nothing = bytes(3) * 20_000
    return zeros, frame + runs + b"\1\0\0", frame + nothing + b"\1\0\0"


@cache
def lying_frames() -> tuple[bytes, ...]:
    """Frame headers that ask for memory: contents of a terabyte, windows of gigabytes, dictionaries."""
    contents = b"\xe0" + struct.pack("<Q", 1 << 40) + b"\1\0\0"
    windows = [bytes((0, window)) + b"\1\0\0" for window in (0x50, 0x58, 0xA8, 0xFF)]
    dictionary = b"\x03\x48\1\2\3\4\1\0\0"
    return (contents, *windows, dictionary, b"\x04\x48\1\0\0" + bytes(4), b"\x08\x48\1\0\0")
