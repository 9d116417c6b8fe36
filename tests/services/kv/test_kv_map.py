"""An answer says at what precision each of the prompt's tokens was sent, over real services and every codec."""

import pytest

from spectrumkv.client.request import KvChoice, Request, Sampling, TokenIds
from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.v1 import prefill_pb2, prefill_pb2_grpc
from tests.services.kv.test_lossless import random_prompt
from tests.services.pair import Pair

TOKENS = 300
CHOICES = {
    "native": KvChoice(policy="native"),
    "fp16": KvChoice(policy="fp16"),
    "greedy": KvChoice(policy="greedy", budget=0.5),
    "greedy-model": KvChoice(policy="greedy", budget=0.5, scope="model"),
    "adaptive": KvChoice(policy="adaptive", budget=0.6),
    "pdtrim": KvChoice(policy="pdtrim", budget=0.5),
    "spectral": KvChoice(policy="spectral", codec="spectral", budget=0.3),
    "fixed_rate": KvChoice(policy="spectral", codec="fixed_rate", budget=0.3),
    "fixed-width": KvChoice(policy="spectral", codec="absmax", budget=0.5),
}


def asked(pair: Pair, kv: KvChoice, kv_map: str | None) -> object:
    sampling = Sampling(max_tokens=2, ignore_eos=True, seed=1)
    request = Request(prompt=TokenIds(tuple(random_prompt(TOKENS))), sampling=sampling, kv=kv, kv_map=kv_map)
    with pair.client() as client:
        return client.send(request).result()


@pytest.mark.parametrize("name", CHOICES)
def test_the_map_adds_up_to_the_bytes_that_were_sent(llama_pair: Pair, name: str) -> None:
    completion = asked(llama_pair, CHOICES[name], "layers")
    geometry, found, usage = llama_pair.prefill.geometry, completion.kv_map, completion.usage
    assert len(found.bits) == TOKENS
    assert [len(layer) for layer in found.layers] == [TOKENS] * geometry.layers
    # All bytes but tier maps, headers and messages; those of a segment's own scales are among them.
    bodies = sum(found.bits) * geometry.layers * geometry.elements_per_token_layer / 8
    assert bodies == pytest.approx(sum(one.bytes for one in usage.tiers), rel=1e-6)
    assert bodies <= usage.kv_bytes_sent
    for token, bits in enumerate(found.bits):
        assert sum(layer[token] for layer in found.layers) / geometry.layers == pytest.approx(bits, rel=1e-5)
    if name == "native":
        assert set(found.bits) == {8.0 * geometry.native_dtype.itemsize}
    if name == "fp16":
        assert set(found.bits) == {16.0}


@pytest.mark.parametrize("name", ["greedy", "spectral"])
def test_a_map_costs_no_byte_of_kv_and_comes_only_where_it_is_asked_for(llama_pair: Pair, name: str) -> None:
    without, tokens, layers = (asked(llama_pair, CHOICES[name], detail) for detail in (None, "tokens", "layers"))
    assert without.kv_map is None
    assert tokens.kv_map.layers == ()
    assert tokens.kv_map.bits == layers.kv_map.bits
    # In how many messages it leaves is a matter of time; the KV itself is the same.
    assert without.usage.tiers == tokens.usage.tiers == layers.usage.tiers
    assert without.token_ids == tokens.token_ids == layers.token_ids
    assert "kv_map" not in without.as_json()
    assert len(layers.as_json()["kv_map"]["layers"]) == llama_pair.prefill.geometry.layers


def test_an_unknown_detail_is_refused(llama_pair: Pair) -> None:
    with pytest.raises(InvalidArgumentError, match="kv_map is 'rows'; allowed: 'tokens', 'layers'"):
        Request(prompt="x", kv_map="rows")
    request = Request(prompt="x").to_proto()
    request.kv_map = 9
    assert isinstance(request, prefill_pb2.GenerateRequest)
    with llama_pair.client() as client:
        stub = prefill_pb2_grpc.PrefillServiceStub(client._channel)
        with pytest.raises(Exception, match=r"kv_map is 9; allowed: 0 \(KV_MAP_DETAIL_UNSPECIFIED\)"):
            list(stub.Generate(request))


def test_server_info_has_the_room_of_each_worker(llama_pair: Pair) -> None:
    with llama_pair.client() as client:
        info = client.server_info()
    (room,) = info.decode_worker_rooms
    assert room.address == info.decode_workers[0]
    assert 0 < room.slots_free <= room.slots_total
    assert (info.requests_running, info.requests_waiting) == (0, 0)
