"""The code that reads untrusted bytes, under a coverage-guided fuzzer: it returns or raises DataLossError."""

import contextlib
import hashlib
import random
from functools import cache

import crc32c
import pytest
import torch

from spectrumkv.common.errors import DataLossError, InvalidArgumentError
from spectrumkv.common.kv import tiers, wire
from spectrumkv.common.kv.codecs import absmax, body, native
from spectrumkv.common.kv.codecs.base import codecs
from spectrumkv.common.kv.codecs.calibrated import basis as calibrated_basis
from spectrumkv.common.kv.codecs.calibrated.basis import CalibratedBasis
from spectrumkv.common.kv.codecs.spectral import codec as spectral_codec
from spectrumkv.common.kv.codecs.spectral import layout, segment_codec, symbols
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.segment import SEGMENT_HEADER, KvSegment
from spectrumkv.common.kv.wire import ChunkReader, ChunkWriter, KvChunk
from spectrumkv.common.rpc import decode_stream
from spectrumkv.decode_server import bases
from spectrumkv.decode_server.bases import BasisStore
from spectrumkv.v1 import decode_pb2
from tests.common.kv.codecs.spectral_prompts import basis_of
from tests.faults.damage.coverage import fuzz
from tests.faults.hostile.dialogue import spectral_segments
from tests.faults.hostile.spectral_body import serialized
from tests.faults.report import tell

GEOMETRY = KvGeometry(layers=2, kv_heads=2, head_dim=8, native_dtype=torch.float32)
TOKENS = 9
CODECS = ("absmax", "native", "spectral")
SPECTRAL = (calibrated_basis, segment_codec, spectral_codec, layout, symbols, bases)
FILES = [one.__file__ for one in (decode_stream, absmax, body, native, tiers, wire, *SPECTRAL)]
SHORT_RUN, LONG_RUN = 3000, 60_000


@cache
def basis() -> CalibratedBasis:
    return basis_of(GEOMETRY)


def payloads() -> list[bytes]:
    """Chunks of both codecs, whole layers and pieces of them."""
    found: list[bytes] = []
    for codec, some in (
        (codecs.get("absmax"), [0, 1, 2, 3]),
        (codecs.get("absmax"), [2]),
        (codecs.get("native"), [4]),
    ):
        writer = ChunkWriter(300)
        for layer in range(GEOMETRY.layers):
            for first, tokens in ((0, 4), (4, TOKENS - 4)):
                keys, values = torch.randn(2, GEOMETRY.kv_heads, tokens, GEOMETRY.head_dim)
                kinds = torch.tensor([some[place % len(some)] for place in range(tokens)], dtype=torch.uint8)
                encoded = codec.encode(keys, values, kinds, GEOMETRY)
                found += [
                    bytes(chunk.payload) for chunk, _ in writer.add(KvSegment(layer, first, kinds, encoded.body))
                ]
        found += [bytes(chunk.payload) for chunk, _ in writer.flush()]
    return found


def read_message(data: bytes) -> None:
    with contextlib.suppress(DataLossError):
        request = decode_stream.deserialize_request(data)
        assert isinstance(request, KvChunk | decode_pb2.DecodeRequest)
    with contextlib.suppress(DataLossError):
        decode_stream.deserialize_response(data)


def read_payload(data: bytes) -> None:
    """What decode does with a chunk whose checksum is right; the first byte picks the codec."""
    codec = codecs.get(CODECS[data[0] % len(CODECS)] if data else "absmax").decoder(GEOMETRY, basis())
    payload = data[1:]
    keys = torch.full((GEOMETRY.layers, GEOMETRY.kv_heads, TOKENS, GEOMETRY.head_dim), 7.0)
    values = keys.clone()
    reader = ChunkReader(GEOMETRY.layers, TOKENS)
    with contextlib.suppress(DataLossError):
        segments = reader.read(KvChunk(0, crc32c.crc32c(payload), (payload,)))
        for segment in segments:
            assert 0 <= segment.first_token < segment.first_token + segment.tiers.numel() <= TOKENS
            span = slice(segment.first_token, segment.first_token + segment.tiers.numel())
            sizes = codec.decode(segment, keys[segment.layer, :, span], values[segment.layer, :, span])
            assert sum(sizes.values()) == segment.body.numel()


def read_basis(data: bytes) -> None:
    """What decode does with an upload whose digest is right."""
    piece = decode_pb2.PutBasisRequest(digest=hashlib.sha256(data).digest(), part=data)
    with contextlib.suppress(DataLossError, InvalidArgumentError):
        BasisStore(GEOMETRY).receive(iter([piece]))


TARGETS = {
    "messages": (
        read_message,
        [decode_stream.serialize_request(KvChunk(place, 5, (one,))) for place, one in enumerate(payloads())]
        + [
            decode_stream.serialize_request(decode_pb2.DecodeRequest(begin={"prompt_token_ids": [1, 300]})),
            decode_stream.serialize_request(decode_pb2.DecodeRequest(end={"first_token_id": 3, "digest": b"x" * 32})),
            decode_stream.serialize_response(decode_pb2.DecodeResponse(token={"index": 1, "text": "a"})),
        ],
    ),
    "payloads": (
        read_payload,
        [bytes((codec,)) + one for one in payloads() for codec in (0, 1)] + [SEGMENT_HEADER.pack(0, 1, 0, 0, 1, 0)],
    ),
    "spectral payloads": (
        read_payload,
        [
            b"\2" + serialized([segment])
            for tokens in (1, 4, TOKENS)
            for segment in spectral_segments(random.Random(tokens), GEOMETRY, basis(), tokens)
        ],
    ),
    "bases": (read_basis, [basis().serialized]),
}


@pytest.mark.parametrize("target", TARGETS)
def test_any_bytes_are_read_or_refused(target: str) -> None:
    read, seeds = TARGETS[target]
    corpus, edges = fuzz(read, seeds, FILES, SHORT_RUN, random.Random(1))
    assert corpus > len(seeds)
    assert edges > 30


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("target", TARGETS)
def test_many_bytes_are_read_or_refused(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    read, seeds = TARGETS[target]
    corpus, edges = fuzz(read, seeds, FILES, LONG_RUN, random.Random(seed))
    tell(capsys, f"{LONG_RUN} inputs for {target}, seed {seed}: {edges} edges, {corpus - len(seeds)} inputs kept")
