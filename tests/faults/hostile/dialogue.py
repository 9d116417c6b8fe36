"""What an honest prefill sends for one request, in parts that can be harmed one by one."""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

import crc32c
import numpy as np
import torch

from spectrumkv.common.kv.codecs.base import codecs
from spectrumkv.common.kv.codecs.calibrated.basis import CalibratedBasis
from spectrumkv.common.kv.codecs.spectral.layout import TokenClasses
from spectrumkv.common.kv.codecs.spectral.segment_codec import UncodedSegment, encode_segment
from spectrumkv.common.kv.codecs.spectral.tiers import class_bits, token_tiers
from spectrumkv.common.kv.codecs.spectral.transform import LayerTransform
from spectrumkv.common.kv.codecs.tiered import TierCodec
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.segment import KvSegment
from spectrumkv.common.kv.tiers import Tier
from spectrumkv.common.kv.wire import DIGEST_RECORD, ChunkWriter, KvChunk
from spectrumkv.common.model.load import LoadedModel
from spectrumkv.common.rpc.decode_stream import serialize_request
from spectrumkv.kernels.step_classes import HIGHEST_CLASS, LOWEST_CLASS
from spectrumkv.v1 import decode_pb2

# Half of them speak the codec that is served by default.
CODECS = ("spectral", "spectral", "absmax", "native")


@dataclass
class Dialogue:
    """What a prefill would send for one request, part by part.

    Attributes:
        codec: name of the codec that the segments are coded by, whatever Begin says in the end.
        geometry: shape and dtype of the model's cache.
        basis: what segments of codec "spectral" are coded in.
        begin: the first message.
        segments: payload bytes of each chunk.
        end: the last message, totals not yet filled in.
    """

    codec: str
    geometry: KvGeometry
    basis: CalibratedBasis
    begin: decode_pb2.Begin
    segments: list[bytes]
    end: decode_pb2.End


def dialogue(chance: random.Random, loaded: LoadedModel, basis: CalibratedBasis) -> Dialogue:
    """A valid one, of up to a dozen prompt tokens, at random tiers or steps."""
    tokens = chance.randint(1, 12)
    codec = codecs.get(chance.choice(CODECS))
    begin = decode_pb2.Begin(
        request_id="hostile",
        model=loaded.spec.to_proto(),
        codec={"name": codec.name, "version": codec.version},
        prompt_token_ids=[chance.randrange(3, 1000) for _ in range(tokens)],
    )
    if codec.needs_basis:
        begin.codec.basis_digest = basis.digest
    begin.sampling.max_tokens = chance.randint(2, 4)
    begin.sampling.ignore_eos = True
    begin.sampling.seed = 1
    writer = ChunkWriter(chance.choice((1, 2000, 1 << 20)))
    chunks: list[KvChunk] = []
    segments = (
        _tier_segments(chance, loaded.geometry, codec, tokens)
        if isinstance(codec, TierCodec)
        else spectral_segments(chance, loaded.geometry, basis, tokens)
    )
    for segment in segments:
        chunks += [chunk for chunk, _ in writer.add(segment)]
    chunks += [chunk for chunk, _ in writer.flush()]
    totals = writer.totals()
    end = decode_pb2.End(
        first_token_id=chance.randrange(3, 1000),
        chunks=totals.chunks,
        payload_bytes=totals.payload_bytes,
        digest=totals.digest,
    )
    return Dialogue(codec.name, loaded.geometry, basis, begin, [bytes(chunk.payload) for chunk in chunks], end)


def _layers(
    chance: random.Random, geometry: KvGeometry, tokens: int
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Random keys and values of each layer."""
    generator = torch.Generator().manual_seed(chance.randrange(1 << 30))
    for layer in range(geometry.layers):
        keys, values = torch.randn(2, geometry.kv_heads, tokens, geometry.head_dim, generator=generator)
        yield layer, keys, values


def _tier_segments(chance: random.Random, geometry: KvGeometry, codec: TierCodec, tokens: int) -> Iterator[KvSegment]:
    for layer, keys, values in _layers(chance, geometry, tokens):
        some = [Tier.NATIVE] if codec.name == "native" else [Tier.DROP, Tier.INT4, Tier.INT8, Tier.FP16]
        tiers = torch.tensor([chance.choice(some) for _ in range(tokens)], dtype=torch.uint8)
        yield KvSegment(layer, 0, tiers, codec.encode(keys, values, tiers, geometry).body)


def spectral_segments(
    chance: random.Random, geometry: KvGeometry, basis: CalibratedBasis, tokens: int
) -> Iterator[KvSegment]:
    """Each layer in one or two segments, at random steps."""
    for layer, keys, values in _layers(chance, geometry, tokens):
        wanted = chance.uniform(-8, 4)
        middle = chance.randint(0, tokens - 1) if chance.random() < 0.5 else 0
        for first, end in ((0, middle), (middle, tokens)):
            if first < end:
                classes = _token_classes(chance, end - first)
                segment = UncodedSegment(
                    LayerTransform.of_layers(basis)[layer], first, keys[:, first:end], values[:, first:end], classes
                )
                yield _spectral_segment(segment, geometry, wanted)


def _token_classes(chance: random.Random, tokens: int) -> TokenClasses:
    classes = np.array([chance.randint(LOWEST_CLASS, HIGHEST_CLASS) for _ in range(tokens)], np.int64)
    sinks = chance.randint(0, min(4, tokens))
    classes[:sinks] = 0
    return TokenClasses(classes, sinks)


def _spectral_segment(segment: UncodedSegment, geometry: KvGeometry, wanted: float) -> KvSegment:
    body, quantization = encode_segment(segment, float(np.float32(wanted)), geometry)
    tiers = token_tiers(class_bits(quantization.model, quantization.base), segment.tokens)
    return KvSegment(segment.transform.layer, segment.first, tiers, torch.frombuffer(body, dtype=torch.uint8))


def wire_messages(one: Dialogue) -> list[bytes]:
    """The dialogue as it crosses the wire, every checksum in order."""
    messages = [serialize_request(decode_pb2.DecodeRequest(begin=one.begin))]
    messages += [serialize_request(_chunk(place, payload)) for place, payload in enumerate(one.segments)]
    return [*messages, serialize_request(decode_pb2.DecodeRequest(end=one.end))]


def _chunk(place: int, payload: bytes) -> KvChunk:
    return KvChunk(place, crc32c.crc32c(payload), (payload,))


def make_totals_agree(one: Dialogue) -> None:
    """Make End say what the chunks come to."""

    digest = hashlib.sha256()
    for place, payload in enumerate(one.segments):
        digest.update(DIGEST_RECORD.pack(place, len(payload), crc32c.crc32c(payload)))
    one.end.chunks = len(one.segments)
    one.end.payload_bytes = sum(map(len, one.segments))
    one.end.digest = digest.digest()
