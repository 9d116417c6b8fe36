"""What an honest prefill sends for one request, in parts that can be harmed one by one."""

import hashlib
import random
from dataclasses import dataclass

import crc32c
import torch

from spectrumkv.common.decode_stream import serialize_request
from spectrumkv.common.kv.block import Block
from spectrumkv.common.kv.codec import codecs
from spectrumkv.common.kv.tiers import Tier
from spectrumkv.common.kv.wire import DIGEST_RECORD, Chunk, ChunkWriter
from spectrumkv.common.model.load import LoadedModel
from spectrumkv.v1 import decode_pb2


@dataclass
class Dialogue:
    """What a prefill would send for one request, part by part.

    Attributes:
        begin: the first message.
        blocks: payload bytes of each chunk.
        end: the last message, totals not yet filled in.
    """

    begin: decode_pb2.Begin
    blocks: list[bytes]
    end: decode_pb2.End


def dialogue(chance: random.Random, loaded: LoadedModel) -> Dialogue:
    """A valid one, of up to a dozen prompt tokens at random tiers."""
    tokens = chance.randint(1, 12)
    codec = codecs.get(chance.choice(("absmax", "absmax", "native")))
    begin = decode_pb2.Begin(
        request_id="hostile",
        model=loaded.spec.to_proto(),
        codec={"name": codec.name, "version": codec.version},
        prompt_token_ids=[chance.randrange(3, 1000) for _ in range(tokens)],
    )
    begin.sampling.max_tokens = chance.randint(2, 4)
    begin.sampling.ignore_eos = True
    begin.sampling.seed = 1
    writer = ChunkWriter(chance.choice((1, 2000, 1 << 20)))
    geometry = loaded.geometry
    generator = torch.Generator().manual_seed(chance.randrange(1 << 30))
    chunks: list[Chunk] = []
    for layer in range(geometry.layers):
        shape = (2, geometry.kv_heads, tokens, geometry.head_dim)
        keys, values = torch.randn(shape, generator=generator)
        some = [Tier.NATIVE] if codec.name == "native" else [Tier.DROP, Tier.INT4, Tier.INT8, Tier.FP16]
        tiers = torch.tensor([chance.choice(some) for _ in range(tokens)], dtype=torch.uint8)
        block = Block(layer, 0, tiers, codec.encode(keys, values, tiers, geometry).body)
        chunks += [chunk for chunk, _ in writer.add(block)]
    chunks += [chunk for chunk, _ in writer.flush()]
    totals = writer.totals()
    end = decode_pb2.End(
        first_token_id=chance.randrange(3, 1000),
        chunks=totals.chunks,
        payload_bytes=totals.payload_bytes,
        digest=totals.digest,
    )
    return Dialogue(begin, [bytes(chunk.payload) for chunk in chunks], end)


def wire_messages(one: Dialogue) -> list[bytes]:
    """The dialogue as it crosses the wire, every checksum in order."""
    messages = [serialize_request(decode_pb2.DecodeRequest(begin=one.begin))]
    messages += [serialize_request(_chunk(place, payload)) for place, payload in enumerate(one.blocks)]
    return [*messages, serialize_request(decode_pb2.DecodeRequest(end=one.end))]


def _chunk(place: int, payload: bytes) -> Chunk:
    return Chunk(place, crc32c.crc32c(payload), (payload,))


def make_totals_agree(one: Dialogue) -> None:
    """Make End say what the chunks come to."""

    digest = hashlib.sha256()
    for place, payload in enumerate(one.blocks):
        digest.update(DIGEST_RECORD.pack(place, len(payload), crc32c.crc32c(payload)))
    one.end.chunks = len(one.blocks)
    one.end.payload_bytes = sum(map(len, one.blocks))
    one.end.digest = digest.digest()
