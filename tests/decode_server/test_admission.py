"""Which requests decode admits, and what it holds for them."""

import pytest
from prometheus_client import CollectorRegistry

from spectrumkv.common.errors import (
    BasisMissingError,
    FailedPreconditionError,
    InvalidArgumentError,
    ResourceExhaustedError,
    SpectrumKVError,
)
from spectrumkv.common.generation.params import SamplingParams
from spectrumkv.common.kv.codecs.base import codecs
from spectrumkv.common.kv.codecs.spectral.codec import SpectralCodec
from spectrumkv.common.model.load import LoadedModel, load_model
from spectrumkv.common.telemetry.metrics import Metrics
from spectrumkv.decode_server.admission import admit
from spectrumkv.decode_server.bases import BasisStore
from spectrumkv.decode_server.kv_pool import KvPool
from spectrumkv.v1 import decode_pb2, kv_pb2
from tests.common.kv.codecs.spectral_prompts import basis_of
from tests.tiny_models import build_tiny_model

SLOTS = 64


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(build_tiny_model("llama", tmp_path_factory.mktemp("model"))), "cpu", "auto")


@pytest.fixture
def pool(loaded: LoadedModel) -> KvPool:
    geometry = loaded.geometry
    memory = SLOTS * geometry.layers * geometry.native_bytes_per_token_layer
    return KvPool(geometry, memory, loaded.device, Metrics(CollectorRegistry()))


def begin(loaded: LoadedModel, tokens: int = 5, max_tokens: int = 3, codec: str = "absmax") -> decode_pb2.Begin:
    return decode_pb2.Begin(
        request_id="one",
        model=loaded.spec.to_proto(),
        codec=kv_pb2.CodecId(name=codec, version=codecs.get(codec).version),
        prompt_token_ids=range(tokens),
        sampling=SamplingParams(max_tokens=max_tokens).to_proto(),
    )


def test_a_request_holds_its_slots_until_the_block_ends(loaded: LoadedModel, pool: KvPool) -> None:
    with admit(begin(loaded), loaded, pool, BasisStore(loaded.geometry)) as request:
        assert (request.prompt_tokens, request.allocation.capacity, request.slots) == (5, 8, 8)
        assert pool.used == 8
    assert pool.used == 0


@pytest.mark.parametrize(
    ("change", "kind", "sentence"),
    [
        ({"model": {"layers": 99}}, FailedPreconditionError, "layers is .* on decode and 99 on prefill"),
        ({"codec": {"name": "magic"}}, FailedPreconditionError, "codec 'magic', unknown to decode"),
        ({"codec": {"version": 99}}, FailedPreconditionError, "decode has version 1, prefill 99"),
        (
            {"codec": {"name": "spectral", "version": SpectralCodec.version}},
            BasisMissingError,
            "send it with PutBasis",
        ),
        ({"prompt_token_ids": [10**6]}, InvalidArgumentError, "Begin has token id 1000000"),
        ({"sampling": {"top_p": 2.0}}, InvalidArgumentError, "top_p"),
        ({"sampling": {"max_tokens": 10**6}}, InvalidArgumentError, "max_tokens is 1000000"),
        ({"sampling": {"max_tokens": SLOTS}}, FailedPreconditionError, "need 69 slots"),
        ({"sampling": {"temperature": 1.0}}, InvalidArgumentError, "needs a seed"),
    ],
)
def test_what_cannot_be_served_is_refused_and_holds_nothing(
    loaded: LoadedModel, pool: KvPool, change: dict[str, object], kind: type[SpectrumKVError], sentence: str
) -> None:
    message = begin(loaded)
    message.MergeFrom(decode_pb2.Begin(**change))
    with pytest.raises(kind, match=sentence), admit(message, loaded, pool, BasisStore(loaded.geometry)):
        pass
    assert pool.used == 0


def test_an_empty_prompt_is_refused(loaded: LoadedModel, pool: KvPool) -> None:
    with (
        pytest.raises(InvalidArgumentError, match="no prompt tokens"),
        admit(begin(loaded, tokens=0), loaded, pool, BasisStore(loaded.geometry)),
    ):
        pass


def test_a_full_pool_refuses(loaded: LoadedModel, pool: KvPool) -> None:
    bases = BasisStore(loaded.geometry)
    with (
        admit(begin(loaded, tokens=40), loaded, pool, bases),
        pytest.raises(ResourceExhaustedError, match="no run of 43"),
        admit(begin(loaded, tokens=40), loaded, pool, bases),
    ):
        pass


class Twin(SpectralCodec):
    """Another codec that codes in the same basis."""

    name = "twin"
    version = 7


def test_one_upload_serves_every_codec_that_codes_in_the_basis(
    loaded: LoadedModel, pool: KvPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codecs, "_choices", dict(codecs._choices))
    codecs.register(Twin.name)(Twin())
    bases, basis = BasisStore(loaded.geometry), basis_of(loaded.geometry)
    bases.receive(iter([decode_pb2.PutBasisRequest(digest=basis.digest, part=basis.serialized)]))
    for name in (Twin.name, SpectralCodec.name):
        message = begin(loaded, codec=name)
        message.codec.basis_digest = codecs.get(name).basis_digest(basis)
        with admit(message, loaded, pool, bases) as request:
            assert request.prompt_tokens == 5
