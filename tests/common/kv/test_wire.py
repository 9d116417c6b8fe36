import struct

import crc32c
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectrumkv.common.errors import DataLossError
from spectrumkv.common.kv.segment import MAX_CHUNK_PAYLOAD_BYTES, SEGMENT_HEADER, KvSegment
from spectrumkv.common.kv.tiers import Tier
from spectrumkv.common.kv.wire import ChunkReader, ChunkTotals, ChunkWriter, KvChunk


def segment(layer: int, first: int, tiers: list[int], body: bytes = b"") -> KvSegment:
    return KvSegment(
        layer,
        first,
        torch.tensor(tiers, dtype=torch.uint8),
        torch.tensor(list(body), dtype=torch.uint8),
    )


def written(segments: list[KvSegment], target_bytes: int = 64) -> tuple[list[KvChunk], ChunkTotals]:
    writer = ChunkWriter(target_bytes)
    written = [one for segment in segments for one in writer.add(segment)]
    written += writer.flush()
    assert [segment for _, in_chunk in written for segment in in_chunk] == segments
    return [chunk for chunk, _ in written], writer.totals()


def receive(chunks: list[KvChunk], totals: ChunkTotals, layers: int, tokens: int) -> list[KvSegment]:
    reader = ChunkReader(layers, tokens)
    segments = [one for chunk in chunks for one in reader.read(chunk)]
    reader.finish(totals)
    return segments


def rejected(reason: str, chunk: KvChunk, reader: ChunkReader) -> None:
    with pytest.raises(DataLossError) as caught:
        reader.read(chunk)
    assert caught.value.reason == reason, caught.value.message


def checked(payload: bytes, sequence: int = 0) -> KvChunk:
    return KvChunk(sequence, crc32c.crc32c(payload), (payload,))


def test_a_segment_is_laid_out_as_documented() -> None:
    tiers = [Tier.FP16, Tier.DROP, Tier.INT8, Tier.INT4, Tier.FP16]
    [chunk], _ = written([segment(7, 11, tiers, b"abcd")])
    # Two bits a token, the first token in the lowest bits: 3, 0, 2, 1 | 3, then a zero byte is not needed
    # because two bytes are an even number.
    expected = struct.pack("<HBBIII", 7, 0, 0, 11, 5, 4) + bytes([0b01_10_00_11, 0b00_00_00_11]) + b"abcd"
    assert chunk.payload == expected


def test_a_uniform_segment_has_no_tier_map() -> None:
    [chunk], _ = written([segment(1, 0, [Tier.INT8] * 3, b"xy")])
    assert chunk.payload == struct.pack("<HBBIII", 1, 1, Tier.INT8, 0, 3, 2) + b"xy"


def test_an_odd_tier_map_is_padded() -> None:
    [chunk], _ = written([segment(0, 0, [Tier.INT8, Tier.INT4], b"xy")])
    assert chunk.payload == struct.pack("<HBBIII", 0, 0, 0, 0, 2, 2) + bytes([0b0110, 0]) + b"xy"


@st.composite
def prompts(draw: st.DrawFn) -> tuple[int, int, list[KvSegment]]:
    layers, tokens = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    segments = []
    for layer in range(layers):
        first = 0
        while first < tokens:
            size = draw(st.integers(1, tokens - first))
            tiers = draw(st.lists(st.sampled_from(list(Tier)[:4]), min_size=size, max_size=size))
            body = draw(st.binary(max_size=50).filter(lambda body: len(body) % 2 == 0))
            if set(tiers) != {Tier.DROP} and not body:
                body = bytes(2 * size)
            if len(set(tiers)) == 1 and tiers[0] != Tier.DROP:
                body = bytes(2 * size)
            segments.append(segment(layer, first, tiers, body))
            first += size
    return layers, tokens, draw(st.permutations(segments))


@given(prompts(), st.integers(1, 200))
def test_what_is_written_is_read(prompt: tuple[int, int, list[KvSegment]], target_bytes: int) -> None:
    layers, tokens, segments = prompt
    chunks, totals = written(segments, target_bytes)
    arrived = receive(chunks, totals, layers, tokens)
    assert [(one.layer, one.first_token, one.tiers.tolist(), bytes(one.body.tolist())) for one in arrived] == [
        (one.layer, one.first_token, one.tiers.tolist(), bytes(one.body.tolist())) for one in segments
    ]


@given(prompts(), st.data())
def test_any_flipped_bit_is_found(prompt: tuple[int, int, list[KvSegment]], data: st.DataObject) -> None:
    layers, tokens, segments = prompt
    chunks, totals = written(segments)
    hit = data.draw(st.integers(0, len(chunks) - 1))
    payload = bytearray(chunks[hit].payload)
    bit = data.draw(st.integers(0, len(payload) * 8 - 1))
    payload[bit // 8] ^= 1 << bit % 8
    chunks[hit] = KvChunk(chunks[hit].sequence, chunks[hit].crc32c, (bytes(payload),))
    with pytest.raises(DataLossError):
        receive(chunks, totals, layers, tokens)


@given(prompts(), st.data())
def test_dropped_doubled_and_swapped_chunks_are_found(
    prompt: tuple[int, int, list[KvSegment]], data: st.DataObject
) -> None:
    layers, tokens, segments = prompt
    chunks, totals = written(segments, target_bytes=1)
    hit = data.draw(st.integers(0, len(chunks) - 1))
    damage = data.draw(st.sampled_from(["drop", "double", "swap"] if len(chunks) > 1 else ["drop", "double"]))
    if damage == "drop":
        del chunks[hit]
    elif damage == "double":
        chunks.insert(hit, chunks[hit])
    else:
        other = (hit + 1) % len(chunks)
        chunks[hit], chunks[other] = chunks[other], chunks[hit]
    with pytest.raises(DataLossError):
        receive(chunks, totals, layers, tokens)


@pytest.mark.parametrize("field", ["chunks", "payload_bytes", "digest"])
def test_announced_totals_must_be_true(field: str) -> None:
    [chunk], totals = written([segment(0, 0, [Tier.FP16], b"ab")])
    lies = {"chunks": 2, "payload_bytes": 1, "digest": bytes(32)}
    reader = ChunkReader(1, 1)
    reader.read(chunk)
    with pytest.raises(DataLossError, match=field):
        reader.finish(ChunkTotals(**{**vars(totals), field: lies[field]}))


def test_missing_tokens_are_named() -> None:
    [chunk], totals = written([segment(0, 0, [Tier.FP16], b"ab")])
    reader = ChunkReader(2, 3)
    reader.read(chunk)
    with pytest.raises(DataLossError, match="5 token-layers never arrived, the first of them token 1 of layer 0"):
        reader.finish(totals)


@pytest.mark.parametrize(
    ("reason", "header", "rest"),
    [
        ("malformed", struct.pack("<HBB", 0, 0, 0), b""),
        ("malformed", SEGMENT_HEADER.pack(0, 2, 0, 0, 1, 2), b"\0\0ab"),
        ("malformed", SEGMENT_HEADER.pack(0, 1, 5, 0, 1, 2), b"ab"),
        ("malformed", SEGMENT_HEADER.pack(0, 1, Tier.FP16, 0, 0, 2), b"ab"),
        ("malformed", SEGMENT_HEADER.pack(0, 1, Tier.FP16, 0, 1, 3), b"abc"),
        ("malformed", SEGMENT_HEADER.pack(0, 1, Tier.FP16, 0, 1, 2**32 - 2), b"ab"),
        ("malformed", SEGMENT_HEADER.pack(0, 0, 0, 0, 2**32 - 1, 2), b"ab"),
        ("malformed", SEGMENT_HEADER.pack(0, 1, Tier.FP16, 0, 2**32 - 1, 2), b"ab"),
        ("range", SEGMENT_HEADER.pack(0, 1, Tier.DROP, 0, 2**32 - 1, 0), b""),
        ("range", SEGMENT_HEADER.pack(2, 1, Tier.FP16, 0, 1, 2), b"ab"),
        ("range", SEGMENT_HEADER.pack(0, 1, Tier.FP16, 4, 1, 2), b"ab"),
        ("range", SEGMENT_HEADER.pack(0, 1, Tier.FP16, 2**32 - 1, 2, 2), b"ab"),
    ],
)
def test_lying_headers_are_refused(reason: str, header: bytes, rest: bytes) -> None:
    rejected(reason, checked(header + rest), ChunkReader(layers=2, tokens=4))


def test_an_empty_and_an_oversized_chunk_are_refused() -> None:
    rejected("size", checked(b""), ChunkReader(1, 1))
    rejected("size", checked(bytes(MAX_CHUNK_PAYLOAD_BYTES + 1)), ChunkReader(1, 1))


def test_tokens_that_arrive_twice_are_refused() -> None:
    once = SEGMENT_HEADER.pack(0, 1, Tier.FP16, 1, 1, 2) + b"ab"
    rejected("repeated", checked(once + once), ChunkReader(1, 4))


def test_chunks_stay_near_the_target_and_under_the_limit() -> None:
    body = bytes(MAX_CHUNK_PAYLOAD_BYTES // 2)
    chunks, _ = written([segment(layer, 0, [Tier.FP16], body) for layer in range(5)], MAX_CHUNK_PAYLOAD_BYTES)
    assert [len(chunk.payload) <= MAX_CHUNK_PAYLOAD_BYTES for chunk in chunks] == [True] * 5
