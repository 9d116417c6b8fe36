import hashlib
import math
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load, save

from spectrumkv.common.errors import (
    BasisMissingError,
    DataLossError,
    InvalidArgumentError,
    ResourceExhaustedError,
)
from spectrumkv.common.kv.codecs.calibrated.basis import CalibratedBasis
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.decode_server.bases import BasisStore
from spectrumkv.v1 import decode_pb2
from tests.common.kv.codecs.spectral_prompts import basis_of

GEOMETRY = KvGeometry(layers=3, kv_heads=2, head_dim=16, native_dtype=torch.float32)


def pieces(data: bytes, digest: bytes, size: int = 5000) -> Iterator[decode_pb2.PutBasisRequest]:
    for start in range(0, len(data), size):
        yield decode_pb2.PutBasisRequest(digest=digest, part=data[start : start + size])


def put(store: BasisStore, basis: CalibratedBasis) -> int:
    return store.receive(pieces(basis.serialized, basis.digest))


def test_a_basis_is_kept_under_its_digest() -> None:
    store, basis = BasisStore(GEOMETRY), basis_of(GEOMETRY)
    with pytest.raises(BasisMissingError, match=basis.digest.hex()[:16]):
        store.get(basis.digest)
    assert put(store, basis) > len(basis.serialized)
    assert store.get(basis.digest).serialized == basis.serialized


KEPT_BYTES = basis_of(GEOMETRY).memory_bytes


def test_the_least_recently_used_one_gives_way() -> None:
    store = BasisStore(GEOMETRY, most_bytes=4 * KEPT_BYTES)
    bases = [basis_of(GEOMETRY, seed) for seed in range(5)]
    for basis in bases[:4]:
        put(store, basis)
    store.get(bases[0].digest)
    put(store, bases[4])
    store.get(bases[0].digest)
    with pytest.raises(BasisMissingError):
        store.get(bases[1].digest)


def test_one_in_use_is_never_dropped() -> None:
    store = BasisStore(GEOMETRY, most_bytes=2 * KEPT_BYTES)
    first, second, third = (basis_of(GEOMETRY, seed) for seed in range(3))
    put(store, first)
    with store.hold(first.digest) as held:
        put(store, second)
        put(store, third)
        assert store.get(first.digest) is held
        with store.hold(third.digest), pytest.raises(ResourceExhaustedError, match="spectrumkv basis export"):
            put(store, second)
        put(store, second)
    put(store, third)
    with pytest.raises(BasisMissingError):
        store.get(first.digest)


def test_a_store_has_room_for_the_bases_of_many_kinds_of_prefill_hosts() -> None:
    store = BasisStore(GEOMETRY)
    bases = [basis_of(GEOMETRY, seed) for seed in range(12)]
    for basis in bases:
        put(store, basis)
    for basis in bases:
        store.get(basis.digest)


def test_a_digest_alone_asks_whether_the_basis_is_here() -> None:
    store, basis = BasisStore(GEOMETRY), basis_of(GEOMETRY)
    question = decode_pb2.PutBasisRequest(digest=basis.digest)
    with pytest.raises(BasisMissingError, match=basis.digest.hex()[:16]):
        store.receive(iter([question]))
    put(store, basis)
    assert store.receive(iter([question])) == 0


def test_what_does_not_match_its_digest_is_data_loss() -> None:
    store, basis = BasisStore(GEOMETRY), basis_of(GEOMETRY)
    damaged = bytearray(basis.serialized)
    damaged[len(damaged) // 2] ^= 1
    for data in (bytes(damaged), basis.serialized[:-1]):
        with pytest.raises(DataLossError, match=r"digest"):
            store.receive(
                pieces(data, basis.digest) if data else iter([decode_pb2.PutBasisRequest(digest=basis.digest)])
            )
    mixed = [*pieces(basis.serialized, basis.digest)][:1] + [*pieces(basis.serialized, bytes(32))][1:]
    with pytest.raises(DataLossError, match="different digests"):
        store.receive(iter(mixed))


def test_no_more_is_taken_in_than_a_basis_can_have() -> None:
    def endless() -> Iterator[decode_pb2.PutBasisRequest]:
        while True:
            yield decode_pb2.PutBasisRequest(digest=bytes(32), part=bytes(1 << 16))

    with pytest.raises(InvalidArgumentError, match="no larger"):
        BasisStore(GEOMETRY).receive(endless())


def test_the_size_that_is_allowed_is_that_of_a_basis() -> None:
    for shape in (GEOMETRY, KvGeometry(30, 3, 64, torch.float32)):
        size = len(basis_of(shape).serialized)
        assert size <= CalibratedBasis.largest_bytes(shape) < size + 8192


def test_bases_of_other_models_and_ones_that_cannot_be_undone_are_refused() -> None:
    store = BasisStore(GEOMETRY)
    with pytest.raises(InvalidArgumentError, match=r"\(2, 2, 16\); the model has \(3, 2, 16\)"):
        put(store, basis_of(KvGeometry(2, 2, 16, torch.float32)))
    singular = basis_of(GEOMETRY)
    singular.analysis[1, 0, 1, :, 3] = 0
    with pytest.raises(InvalidArgumentError, match="cannot be undone"):
        put(store, singular)
    for scaling in (0.0, -1.0, 1e-300, 1e300, math.inf, math.nan):
        factors = torch.tensor([1.0, scaling, 1.0], dtype=torch.float64)
        data = save(load(basis_of(GEOMETRY).serialized) | {"rope_scaling": factors})
        with pytest.raises(InvalidArgumentError, match="rope_scaling is"):
            store.receive(pieces(data, hashlib.sha256(data).digest()))
    nonsense = b"\xff" * 100
    with pytest.raises(InvalidArgumentError, match="no calibrated basis"):
        store.receive(pieces(nonsense, hashlib.sha256(nonsense).digest()))
