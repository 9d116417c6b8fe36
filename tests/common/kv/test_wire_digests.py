"""The bytes that cross the wire, and what decode makes of them, pinned by digests in wire_digests.json.

The cases come from the registries of codecs and policies: a new one fails here until its digests are added, by

    python -m tests.common.kv.test_wire_digests

which rewrites the file. What changes a digest that is there takes a new version of the codec, or peers misread it.

Digests must not depend on the processor, so all arithmetic is exact or far from where it would be rounded otherwise:

- Keys and values are small multiples of 1/8, made by integer arithmetic and not by a library's random numbers.
- What one query sees of each token has a level of its own, so that no two tokens' scores are near each other. A bound
  of the logits keeps them at float32 on processors that would otherwise multiply bfloat16.
- Bases have sums and differences of two elements times powers of two, and no rotation. Calibrated bases and rotary
  angles are left out: sums of many products and cosines differ in the last digit between machines.
- Zstandard's output belongs to its version, and what it takes decides the next layer's steps. Spectral segments are
  therefore made with a stand-in that stores streams as they are, which every decoder reads; what Zstandard itself
  makes is compared where its version is the one in the file.

Policy "random" is pinned through numpy's `default_rng`, and Begin's basis digest through safetensors' format.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from prometheus_client import CollectorRegistry

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.kv.allocation import Int4Layers
from spectrumkv.common.kv.budget import BudgetKind
from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.kv.codecs.base import codecs
from spectrumkv.common.kv.codecs.spectral import segment_codec, symbols
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.plan import SCOPES
from spectrumkv.common.kv.policies import policies
from spectrumkv.common.kv.segment import KvSegment, parse_segment
from spectrumkv.common.kv.wire import ChunkReader, ChunkTotals, KvChunk
from spectrumkv.common.rpc.decode_stream import deserialize_request, serialize_request, serialize_response
from spectrumkv.common.service.config import PrefillConfig
from spectrumkv.common.telemetry.metrics import Metrics
from spectrumkv.prefill_server.transfer.pipeline import FirstToken, KvPipeline
from spectrumkv.prefill_server.transfer.plan import KvPlan
from spectrumkv.prefill_server.verdict import ProbeVerdict
from spectrumkv.v1 import decode_pb2, generation_pb2, kv_pb2, prefill_pb2
from tests.common.kv.exact_prompts import PROMPTS, basis_of, capture

FILE = Path(__file__).with_name("wire_digests.json")
ADVICE = "if that is meant, run `python -m tests.common.kv.test_wire_digests` and commit wire_digests.json"
LAYERS = 2
SHAPES = (
    *((1, 64, torch.float32), (3, 64, torch.float16), (2, 80, torch.bfloat16)),
    *((2, 80, torch.float32), (4, 128, torch.float32), (4, 128, torch.bfloat16)),
)
GEOMETRIES = {f"{shape[0]}x{shape[1]}-{str(shape[2])[6:]}": KvGeometry(LAYERS, *shape) for shape in SHAPES}
STREAMED = GEOMETRIES["2x80-float32"]
STREAMED_TOKENS, CHUNK_BYTES = 130, 4096
ZSTANDARD = ".".join(map(str, zstandard.ZSTD_VERSION))
STREAMS = {"native": 1.0, "fp16": 1.0, "uniform-int8": 0.5, "adaptive": 0.4, "spectral": 0.4}
BUDGETS = (0.05, 0.25, 0.3, 0.4, 0.55, 0.8, 1.0)
FRAMING_BYTES = 200


def plan_of(policy: str, codec: str, geometry: KvGeometry, budget: float, scope: str = "layer") -> KvPlan:
    options = prefill_pb2.KvOptions(policy=policy, codec=codec, budget=budget, scope=scope, scorer="attention")
    verdict = ProbeVerdict.from_flag("on", geometry.layers)
    return KvPlan.resolve(options, PrefillConfig(), verdict, seed=3, basis=basis_of(geometry))


def plans(policy: str, codec: str, geometry: KvGeometry) -> Iterator[tuple[str, KvPlan]]:
    """Every plan that this policy and codec allow, and what distinguishes it."""
    chosen, coder = policies.get(policy), codecs.get(codec)
    in_bytes = chosen.budget_kind is BudgetKind.BYTES
    least = coder.least_byte_budget(geometry) if in_bytes else 0.0
    for budget in BUDGETS:
        # Where widths are fixed, some more is needed than what all tokens take at the least of them.
        if not max(chosen.min_budget, least) <= budget <= chosen.max_budget:
            continue
        for scope in ("layer",) if in_bytes else SCOPES:
            plan = plan_of(policy, codec, geometry, budget, scope)
            yield f"{budget} {scope}", plan
            for off in ((1,), (0, 1)) if chosen.heeds_int4 else ():
                yield f"{budget} {scope} {off}", replace(plan, int4=Int4Layers(frozenset(off)))


def shown(geometry: KvGeometry, tokens: int, parts: int) -> Iterator[LayerCapture]:
    """The layers of a prompt, of one part of it after the other."""
    whole = [capture(geometry, layer, tokens) for layer in range(geometry.layers)]
    cuts = [tokens * part // parts for part in range(parts + 1)]
    for first, end in pairwise(cuts):
        for seen in whole:
            yield replace(seen, keys=seen.keys[:, :end], values=seen.values[:, :end]).since(first)


class Received:
    """Decode's slots, written segment by segment."""

    def __init__(self, plan: KvPlan, geometry: KvGeometry, tokens: int) -> None:
        self._decoder = plan.decoder(geometry)
        shape = (geometry.layers, 2, geometry.kv_heads, tokens, geometry.head_dim)
        self._states = torch.zeros(shape, dtype=geometry.native_dtype)

    def write(self, segment: KvSegment) -> None:
        span = slice(segment.first_token, segment.first_token + segment.tiers.numel())
        keys, values = self._states[segment.layer, :, :, span]
        self._decoder.decode(segment, keys, values)

    @property
    def data(self) -> bytes:
        return self._states.view(torch.uint8).numpy().tobytes()


def segment_digests(policy: str, codec: str, geometry: KvGeometry) -> dict[str, str]:
    """Of all segments that the plans make of several prompts, and of what decode writes of them."""
    sent, received = hashlib.sha256(), hashlib.sha256()
    for (name, plan), tokens in ((one, tokens) for one in plans(policy, codec, geometry) for tokens in PROMPTS):
        for parts in (1, 3) if plan.streams_chunks and tokens > 2 else (1,):
            encoder, slots = plan.encoder(geometry, tokens, FRAMING_BYTES), Received(plan, geometry, tokens)
            sent.update(f"{name} {tokens} {parts}\n".encode())
            for segment in chain.from_iterable(map(encoder.encode, shown(geometry, tokens, parts))):
                data = segment.header + segment.body.numpy().tobytes()
                sent.update(data)
                slots.write(parse_segment(data, 0)[0])
            received.update(slots.data)
    return {"sent": sent.hexdigest(), "received": received.hexdigest()}


def all_segment_digests(pair: str) -> dict[str, dict[str, str]]:
    """Of a policy and a codec, by geometry."""
    policy, codec = pair.split("/")
    return {name: segment_digests(policy, codec, geometry) for name, geometry in GEOMETRIES.items()}


def stream_digests(policy: str) -> dict[str, str | int]:
    """Of a whole Decode stream as prefill sends it."""
    plan = plan_of(policy, "", STREAMED, STREAMS[policy])
    begin = decode_pb2.Begin(
        request_id="0123456789abcdef",
        model=kv_pb2.ModelSpec(architecture="llama", weights_digest="ab", layers=LAYERS, vocab_size=512),
        codec=plan.codec_id,
        prompt_token_ids=range(300, 300 + STREAMED_TOKENS),
        sampling=generation_pb2.SamplingParams(max_tokens=9, temperature=0.5, seed=2**63, stop=["é"]),
    )
    pipeline = KvPipeline(begin, plan, STREAMED, CHUNK_BYTES, Metrics(CollectorRegistry()))
    for seen in shown(STREAMED, STREAMED_TOKENS, 2 if plan.streams_chunks else 1):
        pipeline.put_layer(seen)
    pipeline.put_first_tokens(FirstToken(42, finished=False))
    messages = [serialize_request(message) for message in pipeline.messages()]
    slots, reader = Received(plan, STREAMED, STREAMED_TOKENS), ChunkReader(LAYERS, STREAMED_TOKENS)
    opening, *chunks, closing = map(deserialize_request, messages)
    assert opening.begin == begin
    for chunk in chunks:
        assert isinstance(chunk, KvChunk)
        for segment in reader.read(chunk):
            slots.write(segment)
    reader.finish(ChunkTotals(closing.end.chunks, closing.end.payload_bytes, closing.end.digest))
    return {"messages": len(messages), "sent": digest(*messages), "received": digest(slots.data)}


def response_digest() -> str:
    """Of what decode answers: slots, two tokens, the end."""
    likely = generation_pb2.TokenLogprob(token_id=7, logprob=-0.25)
    first = generation_pb2.Token(index=1, token_id=7, text="é", logprob=-0.25, top_logprobs=[likely])
    finished = decode_pb2.DecodeFinished(finish_reason="FINISH_REASON_STOP", recomputed_prompt_tokens=1, tokens=2)
    responses = [
        decode_pb2.DecodeResponse(admitted=decode_pb2.Admitted(slots=128)),
        decode_pb2.DecodeResponse(token=first),
        decode_pb2.DecodeResponse(token=generation_pb2.Token(index=2)),
        decode_pb2.DecodeResponse(finished=finished),
    ]
    return digest(*map(serialize_response, responses))


def digest(*messages: bytes) -> str:
    return hashlib.sha256(b"".join(len(one).to_bytes(4, "little") + one for one in messages)).hexdigest()


def stored(data: np.ndarray) -> bytes:
    """What `compress` makes of bytes that Zstandard cannot shorten."""
    return data.tobytes()


def with_stored_streams(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(symbols, "compress", stored)
    patch.setattr(segment_codec, "compress", stored)


def pairs() -> list[str]:
    """Each policy with each codec that may write it, as "policy/codec"."""
    found = []
    for policy in policies:
        for codec in codecs:
            try:
                plan_of(policy, codec, STREAMED, policies.get(policy).max_budget)
            except InvalidArgumentError:
                continue
            found.append(f"{policy}/{codec}")
    return found


def expected(kind: str, name: str) -> object:
    known = json.loads(FILE.read_text())[kind]
    assert name in known, f"{kind} of {name} have no digests; {ADVICE}"
    return known[name]


def test_each_digest_has_its_case_and_each_codec_a_policy() -> None:
    known = json.loads(FILE.read_text())["segments"]
    assert sorted(known) == sorted(pairs()), f"digests of segments are of other policies and codecs; {ADVICE}"
    written = {pair.split("/")[1] for pair in known}
    assert written == set(codecs), "a codec is written by no policy, so that nothing here pins its bytes"


@pytest.mark.parametrize("pair", pairs())
def test_segments_are_what_they_were(pair: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_stored_streams(monkeypatch)
    assert all_segment_digests(pair) == expected("segments", pair), f"segments of {pair} changed; {ADVICE}"


@pytest.mark.parametrize("policy", STREAMS)
def test_streams_are_what_they_were(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_stored_streams(monkeypatch)
    assert stream_digests(policy) == expected("streams", policy), f"streams of {policy} changed; {ADVICE}"


def test_responses_and_basis_are_what_they_were() -> None:
    assert response_digest() == expected("others", "responses"), f"responses changed; {ADVICE}"
    assert basis_of(STREAMED).digest.hex() == expected("others", "basis"), f"a serialized basis changed; {ADVICE}"


def test_compressed_segments_are_what_they_were() -> None:
    if expected("others", "zstandard") != ZSTANDARD:
        pytest.skip(f"the digests are of another Zstandard than {ZSTANDARD}")
    found = all_segment_digests("spectral/spectral")
    assert found == expected("others", "compressed"), f"segments that Zstandard compressed changed; {ADVICE}"


def rewrite() -> None:
    """Write the digests of what this machine makes."""
    others = {"responses": response_digest(), "basis": basis_of(STREAMED).digest.hex(), "zstandard": ZSTANDARD}
    compressed = {"compressed": all_segment_digests("spectral/spectral")}
    with pytest.MonkeyPatch.context() as patch:
        with_stored_streams(patch)
        segments = {pair: all_segment_digests(pair) for pair in pairs()}
        streams = {policy: stream_digests(policy) for policy in STREAMS}
    written = {"segments": segments, "streams": streams, "others": others | compressed}
    FILE.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    rewrite()
