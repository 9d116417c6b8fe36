"""A transfer without services: layers to chunks and back, of all KV heads or of those that a rank holds."""

from collections.abc import Iterator

import pytest
import torch

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.kv.allocation import Int4Layers
from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.kv.codecs.base import codecs
from spectrumkv.common.kv.geometry import HeadRange, KvGeometry
from spectrumkv.common.kv.plan import CodingPlan
from spectrumkv.common.kv.policies import policies
from spectrumkv.common.kv.receiving import SegmentWriter
from spectrumkv.common.kv.wire import ChunkReader, ChunkWriter, KvChunk
from tests.common.kv.codecs.spectral_prompts import basis_of

GEOMETRY = KvGeometry(layers=2, kv_heads=4, head_dim=32, native_dtype=torch.float32)
TOKENS = 50


class Slots:
    """Plain tensors."""

    def __init__(self, geometry: KvGeometry) -> None:
        self.states = torch.zeros(2, geometry.layers, geometry.kv_heads, TOKENS, geometry.head_dim)
        self.dropped: dict[int, list[int]] = {}

    def keys(self, layer: int, first: int, end: int) -> torch.Tensor:
        return self.states[0, layer, :, first:end]

    def values(self, layer: int, first: int, end: int) -> torch.Tensor:
        return self.states[1, layer, :, first:end]

    def drop(self, layer: int, tokens: torch.Tensor) -> None:
        self.dropped.setdefault(layer, []).extend(tokens.tolist())


def states() -> torch.Tensor:
    shape = (2, GEOMETRY.layers, GEOMETRY.kv_heads, TOKENS, GEOMETRY.head_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def captures(whole: torch.Tensor, heads: HeadRange) -> Iterator[LayerCapture]:
    queries = torch.randn(GEOMETRY.kv_heads, 7, GEOMETRY.head_dim, generator=torch.Generator().manual_seed(6))
    span = slice(heads.first, heads.end)
    for layer in range(GEOMETRY.layers):
        keys, values = whole[:, layer, span]
        yield LayerCapture(queries[span], keys, values, 0.2, None, None, layer)


def transferred(policy: str, budget: float, heads: HeadRange, whole: torch.Tensor) -> Slots:
    geometry, chosen = GEOMETRY.of_heads(heads), policies.get(policy)
    basis = basis_of(GEOMETRY).of_heads(heads)
    codec = codecs.get(chosen.codec or "absmax")
    plan = CodingPlan(chosen, chosen.budget(budget), "attention", codec, "layer", Int4Layers(), 0, basis)
    encoder, writer = plan.encoder(geometry, TOKENS, 0), ChunkWriter(4096)
    chunks: list[KvChunk] = []
    for capture in captures(whole, heads):
        for segment in encoder.encode(capture):
            chunks += [chunk for chunk, _ in writer.add(segment)]
    chunks += [chunk for chunk, _ in writer.flush()]
    slots, reader = Slots(geometry), ChunkReader(geometry.layers, TOKENS)
    receiving = SegmentWriter(plan.decoder(geometry), slots)
    for chunk in chunks:
        receiving.write(reader.read(KvChunk(chunk.sequence, chunk.crc32c, (chunk.payload,))))
    reader.finish(writer.totals())
    return slots


@pytest.mark.parametrize("heads", [HeadRange(0, 4), HeadRange(0, 2), HeadRange(2, 4), HeadRange(3, 4)])
def test_native_arrives_bit_for_bit_whichever_heads_a_rank_holds(heads: HeadRange) -> None:
    whole = states()
    arrived = transferred("native", 1.0, heads, whole)
    assert torch.equal(arrived.states, whole[:, :, heads.first : heads.end])


@pytest.mark.parametrize("heads", [HeadRange(0, 4), HeadRange(2, 4)])
def test_spectral_codes_the_heads_of_a_rank_in_the_basis_of_these_heads(heads: HeadRange) -> None:
    whole = states()
    sent = whole[:, :, heads.first : heads.end]
    arrived = transferred("spectral", 0.5, heads, whole)
    assert float((arrived.states - sent).square().mean() / sent.square().mean()) < 0.05


def test_dropped_tokens_are_reported_to_the_slots() -> None:
    arrived = transferred("sws", 0.5, HeadRange(0, 4), states())
    assert [len(arrived.dropped[layer]) for layer in range(GEOMETRY.layers)] == [25, 25]


@pytest.mark.parametrize(
    ("rank", "degree", "kv_heads", "expected"),
    [(0, 1, 3, (0, 3)), (1, 2, 4, (2, 4)), (3, 4, 2, (1, 2)), (1, 4, 2, (0, 1)), (2, 3, 3, (2, 3))],
)
def test_a_rank_holds_neighbouring_heads(rank: int, degree: int, kv_heads: int, expected: tuple[int, int]) -> None:
    assert HeadRange.of_rank(rank, degree, kv_heads) == HeadRange(*expected)


@pytest.mark.parametrize(("rank", "degree", "kv_heads"), [(0, 2, 3), (2, 2, 4), (0, 3, 2), (-1, 2, 4)])
def test_heads_that_cannot_be_split_are_refused(rank: int, degree: int, kv_heads: int) -> None:
    with pytest.raises(InvalidArgumentError):
        HeadRange.of_rank(rank, degree, kv_heads)


def test_ranks_of_different_degree_overlap_in_heads() -> None:
    assert HeadRange(0, 2).overlap(HeadRange(1, 3)) == HeadRange(1, 2)
    assert HeadRange(0, 2).overlap(HeadRange(2, 4)) is None
