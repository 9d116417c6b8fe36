"""Hostile peers: whatever they send, the services answer with a status, hold nothing afterwards, and serve others."""

import gc
import logging
import random
import resource
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrumkv.client.request import Sampling
from spectrumkv.common.rpc import server as rpc_server
from spectrumkv.common.rpc.channel import MAX_MESSAGE_BYTES, open_channel
from spectrumkv.common.rpc.server import UPLOADS
from spectrumkv.prefill_server.tuning.basis_cache import resolve_basis
from spectrumkv.v1 import decode_pb2
from tests.faults.damage.damage import METHOD
from tests.faults.deployment import until
from tests.faults.hostile.dialogue import dialogue, wire_messages
from tests.faults.hostile.target import HONEST_PROMPT, PUT_BASIS, STREAMS, Target, status_of
from tests.faults.report import tell
from tests.services.pair import running_pair
from tests.tiny_models import tiny_model

# Of six sequences, three go to Decode, two to Generate, one to PutBasis.
RUN, EXHAUSTIVE_RUN = 7_200, 20_400
GROWTH_MIB = 96
# How long a stream may say nothing here; the services' own limit would make tests wait.
SILENCE_SECONDS = 3.0
WARM_UP = 4000


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rpc_server, "FIRST_MESSAGE_SECONDS", SILENCE_SECONDS)
        yield from open_target()


def open_target() -> Iterator[Target]:
    with (
        running_pair(tiny_model("llama"), decode={"kv_memory": "16MiB", "max_streams": str(STREAMS)}) as pair,
        open_channel(f"127.0.0.1:{pair.decode_port}") as decode,
        open_channel(f"127.0.0.1:{pair.prefill_port}") as prefill,
    ):
        one = Target(pair, decode, prefill, resolve_basis(pair.prefill, lambda done: None))
        one.expected = one.honest()
        yield one


# Seeds, and not Hypothesis' own source of chance, which asks that what is drawn depend on nothing else: it depends on
# the lengths of coded bytes, which the last bit of a matrix product can change, and on the bases that decode took.
SEEDS = st.integers(0, 2**32 - 1)


@given(seed=SEEDS)
@settings(max_examples=60)
def test_hostile_decode_streams(target: Target, seed: int) -> None:
    target.attack_decode(random.Random(seed))
    target.wait_until_nothing_is_held()


@given(seed=SEEDS)
@settings(max_examples=60)
def test_hostile_bases(target: Target, seed: int) -> None:
    chance = random.Random(seed)
    target.attack_bases(chance)
    target.attack_decode(chance)
    target.wait_until_nothing_is_held()


def test_an_upload_that_breaks_off_leaves_nothing(target: Target) -> None:
    """More often than there are places for uploads; the sound basis is taken afterwards."""
    piece = decode_pb2.PutBasisRequest(digest=target.basis.digest, part=target.basis.serialized[:100_000])
    end = threading.Event()
    for _ in range(3 * UPLOADS):
        broken = target.decode.stream_stream(PUT_BASIS)(Then(piece.SerializeToString(), end), timeout=60)
        broken.cancel()
        with pytest.raises(grpc.RpcError):
            list(broken)
    end.set()
    until(lambda: upload_sound(target) == "OK", 10, "a basis is taken again")
    assert target.honest() == target.expected


def test_an_upload_that_is_no_message_is_data_loss(target: Target) -> None:
    assert status_of(target.decode.stream_stream(PUT_BASIS)(iter([b"\xff" * 20]), timeout=60)) == "DATA_LOSS"


def upload_sound(target: Target) -> str:
    piece = decode_pb2.PutBasisRequest(digest=target.basis.digest, part=target.basis.serialized)
    return status_of(target.decode.stream_stream(PUT_BASIS)(iter([piece.SerializeToString()]), timeout=60))


@given(chance=st.randoms(use_true_random=False))
@settings(max_examples=50)
def test_hostile_generate_requests(target: Target, chance: random.Random) -> None:
    target.attack_prefill(chance)


def test_others_are_served_as_ever(target: Target) -> None:
    assert target.honest() == target.expected
    target.wait_until_nothing_is_held()


@pytest.mark.parametrize("first_token_id", [2, 49152, 2**32 - 1])
def test_a_lie_about_the_first_token_ends_one_request_alone(target: Target, first_token_id: int) -> None:
    """Token 2 ends generation, the others do not exist; the neighbours in the batch go on."""
    with target.pair.client() as client:
        neighbour = client.generate(HONEST_PROMPT, sampling=Sampling(max_tokens=200, ignore_eos=True))
        next(neighbour)
        assert lie(target, first_token_id) == "INVALID_ARGUMENT"
        assert len(neighbour.result().tokens) == 200


def lie(target: Target, first_token_id: int) -> str:
    one = dialogue(random.Random(3), target.loaded, target.basis)
    one.begin.sampling.ignore_eos = False
    one.end.first_token_id = first_token_id
    return status_of(target.decode.stream_stream(METHOD)(iter(wire_messages(one)), timeout=60))


@pytest.mark.parametrize("mebibytes", [1, 64])
def test_compressed_messages_are_not_unpacked(target: Target, mebibytes: int) -> None:
    options = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(f"127.0.0.1:{target.pair.decode_port}", options=options) as channel:
        call = channel.stream_stream(METHOD)
        with pytest.raises(grpc.RpcError) as caught:
            list(call(iter([bytes(mebibytes << 20)]), timeout=60, compression=grpc.Compression.Gzip))
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_messages_over_the_limit_are_refused(target: Target) -> None:
    options = [("grpc.max_send_message_length", -1)]
    address = f"127.0.0.1:{target.pair.decode_port}"
    with grpc.insecure_channel(address, options=options) as channel, pytest.raises(grpc.RpcError) as caught:
        list(channel.stream_stream(METHOD)(iter([bytes(MAX_MESSAGE_BYTES + 1)]), timeout=60))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_thousands_of_open_streams(target: Target) -> None:
    """Those beyond the limit are refused at once; those that say nothing are ended."""
    silence = threading.Event()

    streams = [target.decode.stream_stream(METHOD)(Forever(silence), timeout=60) for _ in range(1500)]
    codes = [code_of(stream) for stream in streams]
    silence.set()
    assert codes.count("RESOURCE_EXHAUSTED") >= 750
    assert set(codes) <= {"RESOURCE_EXHAUSTED", "CANCELLED", "DEADLINE_EXCEEDED"}
    assert target.honest() == target.expected
    target.wait_until_nothing_is_held()


class Then:
    """An iterator of one request, and of no more until the end."""

    def __init__(self, first: bytes, end: threading.Event) -> None:
        self._messages, self._end = iter([first]), end

    def __iter__(self) -> "Then":
        return self

    def __next__(self) -> bytes:
        for message in self._messages:
            return message
        self._end.wait()
        raise StopIteration


class Forever:
    """An iterator of requests that has none."""

    def __init__(self, end: threading.Event) -> None:
        self._end = end

    def __iter__(self) -> "Forever":
        return self

    def __next__(self) -> bytes:
        self._end.wait()
        raise StopIteration


def code_of(call: grpc.Call) -> str:
    return call.code().name


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("sequences", [RUN, pytest.param(EXHAUSTIVE_RUN, marks=pytest.mark.exhaustive)])
def test_many_hostile_sequences(
    target: Target, sequences: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # pytest keeps every log record of a test, with its traceback: the memory that grows would be its own.
    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)
    seed = random.SystemRandom().randrange(1 << 32)
    chance = random.Random(seed)
    tried: Counter[str] = Counter()
    answers: Counter[str] = Counter()
    started_at, threads, memory = 0.0, 0, 0.0
    attacks = (target.attack_decode,) * 3 + (target.attack_prefill,) * 2 + (target.attack_bases,)
    for number in range(sequences):
        if number == WARM_UP:
            # By now every code path has run and every pool is filled.
            started_at, threads, memory = time.monotonic(), threading.active_count(), resident_mib()
        kind, status = attacks[number % len(attacks)](chance)
        tried[kind] += 1
        answers[status] += 1
        if number % 1000 == 0:
            assert target.honest() == target.expected
    target.wait_until_nothing_is_held()
    growth = resident_mib() - memory
    tell(
        capsys,
        f"{tried.total()} hostile sequences, seed {seed}, {time.monotonic() - started_at:.0f} s, "
        f"memory {growth:+.0f} MiB: {dict(sorted(tried.items()))}, answers {dict(sorted(answers.items()))}",
    )
    assert target.honest() == target.expected
    assert growth < GROWTH_MIB
    assert threading.active_count() <= threads + 4


def resident_mib() -> float:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20
