"""Hostile peers: whatever they send, the services answer with a status, hold nothing afterwards, and serve others."""

import gc
import logging
import random
import resource
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrumkv.client.request import Sampling, TokenIds
from spectrumkv.common.model.load import LoadedModel
from spectrumkv.common.rpc import MAX_MESSAGE_BYTES, open_channel
from spectrumkv.decode_server import service as decode_service
from tests.faults.damage import METHOD
from tests.faults.dialogue import dialogue, wire_messages
from tests.faults.hostile import generate_request, sequence
from tests.faults.report import tell
from tests.services.pair import Pair, running_pair, total
from tests.tiny_models import tiny_model

GENERATE = "/spectrumkv.v1.PrefillService/Generate"
# At least 20 000 sequences in the long run: these on Decode, and half as many on Generate.
LONG_RUN = 13_600
STREAMS = 32
ANSWERS = {
    "OK",
    "INVALID_ARGUMENT",
    "NOT_FOUND",
    "FAILED_PRECONDITION",
    "RESOURCE_EXHAUSTED",
    "DATA_LOSS",
    # Prompt KV of NaN and infinities makes logits of NaN: that request's own fault, named as such.
    "INTERNAL",
}
INTERNAL_SENTENCES = ("logits", "Exception deserializing request")
GROWTH_MIB = 96
WARM_UP = 2000


@dataclass
class Target:
    """Both services, raw channels to them, and what an honest request gets."""

    pair: Pair
    decode: grpc.Channel
    prefill: grpc.Channel
    expected: tuple[int, ...] = ()

    @property
    def loaded(self) -> LoadedModel:
        return self.pair.prefill

    def honest(self, tokens: int = 12) -> tuple[int, ...]:
        with self.pair.client() as client:
            sampling = Sampling(max_tokens=tokens, ignore_eos=True)
            return tuple(
                one.token_id for one in client.generate(TokenIds((7, 8, 9)), sampling=sampling).result().tokens
            )

    def held(self) -> float:
        metrics = (self.pair.prefill_metrics, self.pair.decode_metrics)
        names = ("kv_bytes_resident", "kv_slots_used_ratio", "requests_running", "requests_waiting")
        return sum(total(one, name) for one in metrics for name in names)

    def wait_until_nothing_is_held(self) -> None:
        deadline = time.monotonic() + 10
        while self.held():
            assert time.monotonic() < deadline, "something is still held"
            time.sleep(0.001)

    def attack_decode(self, chance: random.Random) -> str:
        messages = sequence(chance, self.loaded)
        return status_of(self.decode.stream_stream(METHOD)(iter(messages), timeout=60))

    def attack_prefill(self, chance: random.Random) -> str:
        return status_of(self.prefill.unary_stream(GENERATE)(generate_request(chance), timeout=60))


def status_of(call: Iterator[bytes]) -> str:
    """Read a stream to its end and return its status, which must be one that a caller can act on."""
    try:
        for _ in call:
            pass
    except grpc.RpcError as error:
        code, details = error.code().name, error.details() or ""
        assert code in ANSWERS, f"{code}: {details}"
        assert code != "INTERNAL" or any(one in details for one in INTERNAL_SENTENCES), details
        return code
    return "OK"


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    with (
        running_pair(tiny_model("llama"), decode={"kv_memory": "16MiB", "max_streams": str(STREAMS)}) as pair,
        open_channel(f"127.0.0.1:{pair.decode_port}") as decode,
        open_channel(f"127.0.0.1:{pair.prefill_port}") as prefill,
    ):
        one = Target(pair, decode, prefill)
        one.expected = one.honest()
        yield one


@given(chance=st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_hostile_decode_streams(target: Target, chance: random.Random) -> None:
    target.attack_decode(chance)
    target.wait_until_nothing_is_held()


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
        neighbour = client.generate(TokenIds((7, 8, 9)), sampling=Sampling(max_tokens=200, ignore_eos=True))
        next(neighbour)
        assert lie(target, first_token_id) == "INVALID_ARGUMENT"
        assert len(neighbour.result().tokens) == 200


def lie(target: Target, first_token_id: int) -> str:
    one = dialogue(random.Random(3), target.loaded)
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


def test_thousands_of_open_streams(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those beyond the limit are refused at once; those that say nothing lose their place."""
    monkeypatch.setattr(decode_service, "BEGIN_SECONDS", 1.0)
    silence = threading.Event()

    streams = [target.decode.stream_stream(METHOD)(Forever(silence), timeout=60) for _ in range(1500)]
    codes = [code_of(stream) for stream in streams]
    silence.set()
    assert codes.count("RESOURCE_EXHAUSTED") >= 750
    assert set(codes) <= {"RESOURCE_EXHAUSTED", "CANCELLED", "DEADLINE_EXCEEDED"}
    assert target.honest() == target.expected
    target.wait_until_nothing_is_held()


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
def test_many_hostile_sequences(
    target: Target, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # pytest keeps every log record of a test, with its traceback: the memory that grows would be its own.
    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)
    seed = random.SystemRandom().randrange(1 << 32)
    chance = random.Random(seed)
    counts: dict[str, int] = {}
    started_at, threads, memory = 0.0, 0, 0.0
    for number in range(LONG_RUN + LONG_RUN // 2):
        if number == WARM_UP:
            # By now every code path has run and every pool is filled.
            started_at, threads, memory = time.monotonic(), threading.active_count(), resident_mib()
        attack = target.attack_prefill if number % 3 == 2 else target.attack_decode
        status = attack(chance)
        counts[status] = counts.get(status, 0) + 1
        if number % 1000 == 0:
            assert target.honest() == target.expected
    target.wait_until_nothing_is_held()
    growth = resident_mib() - memory
    tell(
        capsys,
        f"{sum(counts.values())} hostile sequences, seed {seed}, {time.monotonic() - started_at:.0f} s, "
        f"memory {growth:+.0f} MiB, answers {dict(sorted(counts.items()))}",
    )
    assert target.honest() == target.expected
    assert growth < GROWTH_MIB
    assert threading.active_count() <= threads + 4


def resident_mib() -> float:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20
