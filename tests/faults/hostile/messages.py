"""Message sequences that no honest peer sends: a valid one, harmed in a few places, often with valid checksums."""

import contextlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from spectrumkv.common.errors import DataLossError
from spectrumkv.common.kv.codecs.calibrated.basis import CalibratedBasis
from spectrumkv.common.kv.segment import MAX_CHUNK_PAYLOAD_BYTES, SEGMENT_HEADER
from spectrumkv.common.kv.tiers import Tier
from spectrumkv.common.model.load import LoadedModel
from spectrumkv.common.rpc.decode_stream import CHECKSUM_BYTES, append_checksum
from tests.faults.hostile.bodies import harm_payload
from tests.faults.hostile.dialogue import Dialogue, dialogue, make_totals_agree, wire_messages
from tests.faults.hostile.requests import EDGES_32, EDGES_64, harm_sampling

HARMS_AT_MOST = 3


@dataclass(frozen=True)
class HostileStream:
    """What is sent on one Decode stream.

    Attributes:
        codec: that its KV is coded by.
        messages: as they cross the wire.
    """

    codec: str
    messages: list[bytes]


def sequence(
    chance: random.Random, loaded: LoadedModel, basis: CalibratedBasis, digests: Sequence[bytes] = ()
) -> HostileStream:
    """One hostile stream.

    Args:
        chance: draws everything.
        loaded: the model.
        basis: that decode knows.
        digests: of other bases that decode may know.
    """
    one = dialogue(chance, loaded, basis)
    if digests and one.codec == "spectral" and chance.random() < 0.1:
        one.begin.codec.basis_digest = chance.choice(digests)
    harms = [chance.choice(HARMS) for _ in range(chance.randint(0, HARMS_AT_MOST))]
    for harm in harms:
        harm(chance, one)
    if harms and chance.random() < 0.7:
        # Totals that fit the harmed chunks, so that the harm is what is found.
        make_totals_agree(one)
    messages = wire_messages(one)
    for _ in range(chance.randint(0, HARMS_AT_MOST) if chance.random() < 0.6 else 0):
        chance.choice(SHUFFLES)(chance, messages)
    return HostileStream(one.codec, messages)


def _harm_sampling(chance: random.Random, one: Dialogue) -> None:
    harm_sampling(chance, one.begin.sampling)


def _harm_prompt(chance: random.Random, one: Dialogue) -> None:
    ids = one.begin.prompt_token_ids
    kind = chance.randrange(4)
    if kind == 0:
        del ids[:]
    elif kind == 1:
        ids[chance.randrange(len(ids)) if ids else 0 :] = [chance.choice(EDGES_32)]
    elif kind == 2:
        ids.extend(range(chance.choice((1, 5, 3000))))
    else:
        del ids[-1:]


def _harm_spec(chance: random.Random, one: Dialogue) -> None:
    name = chance.choice(("layers", "kv_heads", "head_dim", "vocab_size", "context_length", "dtype", "rope_digest"))
    value: Any = chance.choice(EDGES_32) if isinstance(getattr(one.begin.model, name), int) else "x" * 70
    setattr(one.begin.model, name, value)


def _harm_codec(chance: random.Random, one: Dialogue) -> None:
    """Another codec, version or basis than the segments are of."""
    kind = chance.randrange(3)
    if kind == 0:
        one.begin.codec.name = chance.choice(("absmax", "native", "spectral", "fixed_rate", "", "zip", "a" * 5000))
    elif kind == 1:
        one.begin.codec.version = chance.choice((0, 1, 2, 3, 2**32 - 1))
    else:
        one.begin.codec.basis_digest = chance.choice((b"", bytes(32), one.basis.digest[:31], chance.randbytes(5000)))


def _harm_end(chance: random.Random, one: Dialogue) -> None:
    kind = chance.randrange(5)
    if kind == 0:
        one.end.first_token_id = chance.choice((*EDGES_32, 2, 49151, 49152))
    elif kind == 1:
        one.end.chunks = chance.choice(EDGES_32)
    elif kind == 2:
        one.end.payload_bytes = chance.choice(EDGES_64)
    elif kind == 3:
        one.end.digest = chance.randbytes(chance.choice((0, 1, 31, 32, 5000)))
    else:
        one.end.finished = True


def _harm_header(chance: random.Random, one: Dialogue) -> None:
    """Make a segment header lie about one of its fields."""
    if not one.segments:
        return
    place = chance.randrange(len(one.segments))
    payload = bytearray(one.segments[place])
    if len(payload) < SEGMENT_HEADER.size:
        return
    values = list(SEGMENT_HEADER.unpack_from(payload))
    field = chance.randrange(len(values))
    limit = (2**16, 2**8, 2**8, 2**32, 2**32, 2**32)[field]
    near = values[field] + chance.choice((-2, -1, 1, 2))
    values[field] = max(0, min(chance.choice((near, *EDGES_32)), limit - 1))
    SEGMENT_HEADER.pack_into(payload, 0, *values)
    one.segments[place] = bytes(payload)


def _harm_body(chance: random.Random, one: Dialogue) -> None:
    """Put NaN, infinities or noise into tier maps, scales and codes."""
    if not one.segments:
        return
    place = chance.randrange(len(one.segments))
    payload = bytearray(one.segments[place])
    room = len(payload) - SEGMENT_HEADER.size
    if room < 2:
        return
    # float16 NaN, infinities, the smallest subnormal; float32 NaN; noise.
    noise = chance.choice(
        (b"\xff\x7f", b"\x00\x7c", b"\x00\xfc", b"\x01\x00", b"\x00\x00\xc0\x7f", chance.randbytes(2))
    )
    for _ in range(chance.choice((1, 1, 50))):
        at = SEGMENT_HEADER.size + chance.randrange(room - 1)
        payload[at : at + len(noise)] = noise
    one.segments[place] = bytes(payload[: room + SEGMENT_HEADER.size])


def _harm_spectral_body(chance: random.Random, one: Dialogue) -> None:
    """Make a field of a spectral body lie; the segment's header says how long the body is then."""
    if one.codec != "spectral" or not any(one.segments):
        return
    place = chance.randrange(len(one.segments))
    with contextlib.suppress(DataLossError, IndexError):
        # Unless it was harmed before, so that its fields cannot be told apart.
        one.segments[place] = harm_payload(chance, one.segments[place], one.basis, one.geometry)


def _harm_segments(chance: random.Random, one: Dialogue) -> None:
    """Lose, repeat, join, cut or bloat the payloads."""
    kind = chance.randrange(6)
    place = chance.randrange(max(1, len(one.segments)))
    part = one.segments[place : place + 1]
    if kind == 0:
        one.segments[place : place + 1] = []
    elif kind == 1:
        one.segments[place:place] = part
    elif kind == 2:
        one.segments[place : place + 2] = [b"".join(one.segments[place : place + 2])]
    elif kind == 3:
        one.segments[place : place + 1] = [payload[: chance.randrange(len(payload) + 1)] for payload in part]
    elif kind == 4:
        one.segments[place : place + 1] = [
            bytes(chance.choice((0, MAX_CHUNK_PAYLOAD_BYTES, MAX_CHUNK_PAYLOAD_BYTES + 1)))
        ]
    else:
        # Sixteen bytes that ask for as many dropped tokens as there may be, again and again.
        bomb = SEGMENT_HEADER.pack(0, 1, Tier.DROP, 0, chance.choice((1, 12, 2048, 1 << 20, 2**32 - 1)), 0)
        one.segments.insert(place, bomb * chance.choice((1, 2, 4000)))


HARMS: tuple[Callable[[random.Random, Dialogue], None], ...] = (
    _harm_sampling,
    _harm_prompt,
    _harm_spec,
    _harm_codec,
    _harm_end,
    _harm_end,
    _harm_header,
    _harm_header,
    _harm_body,
    _harm_body,
    _harm_spectral_body,
    _harm_spectral_body,
    _harm_spectral_body,
    _harm_spectral_body,
    _harm_segments,
    _harm_segments,
)


def _drop(chance: random.Random, messages: list[bytes]) -> None:
    place = chance.randrange(max(1, len(messages)))
    del messages[place : place + 1]


def _double(chance: random.Random, messages: list[bytes]) -> None:
    place = chance.randrange(max(1, len(messages)))
    messages[place:place] = messages[place : place + 1]


def _swap(chance: random.Random, messages: list[bytes]) -> None:
    chance.shuffle(messages)


def _close_early(chance: random.Random, messages: list[bytes]) -> None:
    del messages[chance.randrange(len(messages) + 1) :]


def _insert(chance: random.Random, messages: list[bytes]) -> None:
    nonsense = chance.randbytes(chance.choice((0, 1, 5, 100, 70_000)))
    messages.insert(chance.randrange(len(messages) + 1), chance.choice((nonsense, append_checksum(nonsense))))


def _flip(chance: random.Random, messages: list[bytes]) -> None:
    """Flip a bit; half of the time with the checksum made good again."""
    if not messages:
        return
    place = chance.randrange(len(messages))
    message = bytearray(messages[place])
    if not message:
        return
    message[chance.randrange(len(message))] ^= 1 << chance.randrange(8)
    changed = bytes(message)
    messages[place] = append_checksum(changed[:-CHECKSUM_BYTES]) if chance.random() < 0.5 else changed


SHUFFLES: tuple[Callable[[random.Random, list[bytes]], None], ...] = (
    _drop,
    _double,
    _swap,
    _close_early,
    _insert,
    _flip,
    _flip,
)
