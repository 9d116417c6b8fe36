"""Bad input gets the status and the sentence that gRPC's conventions ask for, over real sockets."""

import contextlib
import math
import os
import re
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from spectrumkv.client.client import SpectrumClient
from spectrumkv.client.request import KvChoice, Message, Sampling, TokenIds
from spectrumkv.common.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
)
from spectrumkv.common.rpc.channel import open_channel
from spectrumkv.common.rpc.decode_methods import open_decode_stream
from spectrumkv.v1 import decode_pb2
from tests.services.kv.test_lossless import random_prompt
from tests.services.pair import Pair, decode_server, prefill_server, running_pair, total

LONG = "x" * 100_000


def ask(pair: Pair, prompt: Any = "Hello", **options: Any) -> None:
    with pair.client() as client:
        client.generate(prompt, **options).result()


def nothing_is_held(pair: Pair) -> bool:
    return (
        total(pair.decode_metrics, "kv_bytes_resident") == 0 and total(pair.prefill_metrics, "requests_running") == 0
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"prompt": ""}, "empty"),
        ({"prompt": []}, "message"),
        ({"prompt": TokenIds(())}, "empty"),
        ({"prompt": [Message("robot", "Hello")]}, "robot.*system, user"),
        ({"prompt": TokenIds((5, 10**6))}, r"token_ids\[1\] is 1000000"),
        ({"prompt": TokenIds(tuple(random_prompt(3000)))}, "3000.*2048|2048.*3000"),
        ({"sampling": Sampling(temperature=math.nan)}, "temperature.*nan"),
        ({"sampling": Sampling(temperature=-1.0)}, "temperature.*-1"),
        ({"sampling": Sampling(top_p=1.5)}, "top_p.*1.5"),
        ({"sampling": Sampling(top_p=-0.5)}, "top_p.*-0.5"),
        ({"sampling": Sampling(repetition_penalty=-2.0)}, "repetition_penalty.*-2"),
        ({"sampling": Sampling(max_tokens=0)}, "max_tokens.*0"),
        ({"sampling": Sampling(logprobs=100)}, "logprobs.*100"),
        ({"sampling": Sampling(stop=("",))}, "stop"),
        ({"sampling": Sampling(stop_token_ids=(2, 10**6))}, "a stop token id is 1000000; allowed: .* 0 to "),
        ({"kv": KvChoice(policy="magic")}, "unknown policy 'magic'; allowed: .*greedy.*adaptive"),
        ({"kv": KvChoice(scorer="magic")}, "unknown scorer 'magic'; allowed: attention"),
        ({"kv": KvChoice(codec="magic")}, "unknown codec 'magic'; allowed: absmax"),
        ({"kv": KvChoice(scope="magic")}, "unknown scope 'magic'; allowed: layer, model"),
        ({"kv": KvChoice(policy="native", codec="absmax")}, "native.*absmax"),
        ({"kv": KvChoice(policy="greedy", codec="native")}, "codec 'native'.*policy 'native'|policy.*'greedy'"),
        ({"kv": KvChoice(policy="greedy", budget=0.1)}, "greedy.*0.1.*0.25 to 1"),
        ({"kv": KvChoice(policy="balanced", budget=0.3)}, "balanced.*0.3.*0.375"),
        ({"kv": KvChoice(budget=2.0)}, "2.0.*1"),
        ({"kv": KvChoice(budget=math.nan)}, "nan"),
    ],
)
def test_what_is_wrong_is_named(llama_pair: Pair, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"(?is){sentence}"):
        ask(llama_pair, **options)
    assert nothing_is_held(llama_pair)


def test_another_model_is_not_found(llama_pair: Pair) -> None:
    with pytest.raises(NotFoundError, match=r"'gpt-9' is not served here"):
        ask(llama_pair, model="gpt-9")


@pytest.mark.parametrize(
    "options",
    [{"model": LONG}, {"kv": KvChoice(policy=LONG)}, {"prompt": [Message(LONG, "Hi")]}],
    ids=["model", "policy", "role"],
)
def test_a_long_name_is_quoted_by_its_beginning(llama_pair: Pair, options: dict[str, Any]) -> None:
    with pytest.raises((InvalidArgumentError, NotFoundError)) as caught:
        ask(llama_pair, **options)
    assert "x" * 20 in caught.value.message
    assert "x" * 101 not in caught.value.message
    assert "allowed: " in caught.value.message or "this service has" in caught.value.message


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_the_longest_deadline_of_either_service_ends_a_request(tiny_directories: dict[str, Path], side: str) -> None:
    limits: dict[str, dict[str, str]] = {"prefill": {}, "decode": {"kv_memory": "64MiB"}}
    limits[side] |= {"deadline": "0.5", "max_deadline": "0.5"}
    long = Sampling(max_tokens=2000, ignore_eos=True)
    with prefilled_by(tiny_directories["llama"], limits) as client, pytest.raises(DeadlineExceededError) as caught:
        client.generate(TokenIds((5, 6, 7)), sampling=long, timeout=600).result()
    assert "0.5 s, the longest that this server allows (--max-deadline)" in caught.value.message


@contextlib.contextmanager
def prefilled_by(model: Path, options: dict[str, dict[str, str]]) -> Iterator[SpectrumClient]:
    """A client of a pair to which no request came before."""
    with (
        decode_server(model, **options["decode"]) as (_, _, decode_port),
        prefill_server(model, [decode_port], **options["prefill"]) as (_, _, port),
        SpectrumClient(f"127.0.0.1:{port}") as client,
    ):
        yield client


def test_a_deadline_too_short_is_exceeded(llama_pair: Pair) -> None:
    with pytest.raises(DeadlineExceededError):
        ask(llama_pair, timeout=0.001)


def test_no_decode_worker(tiny_directories: dict[str, Path]) -> None:
    with (
        prefill_server(tiny_directories["llama"], [1]) as (_, _, port),
        pytest.raises(UnavailableError, match="no decode worker can be reached; start one or name it with --decode"),
    ):
        generate_on(port)


def test_a_full_decode_worker_refuses_at_once(tiny_directories: dict[str, Path]) -> None:
    with running_pair(tiny_directories["llama"], decode={"kv_memory": "1MiB"}) as pair:
        fill = Sampling(max_tokens=300, ignore_eos=True)
        with pair.client() as client, client.generate(TokenIds((1, 2, 3)), sampling=fill) as held:
            next(held)
            with pytest.raises(ResourceExhaustedError, match="free KV slots") as caught:
                ask(pair, TokenIds((1, 2, 3)), sampling=fill)
            assert caught.value.retry_after_seconds > 0
        with pytest.raises(FailedPreconditionError, match=r"1503 slots, and this decode worker has \d+"):
            ask(pair, TokenIds((1, 2, 3)), sampling=Sampling(max_tokens=1500))


def test_a_full_worker_is_passed_over(tiny_directories: dict[str, Path]) -> None:
    model = tiny_directories["llama"]
    with (
        decode_server(model, kv_memory="1MiB") as (_, _, small),
        decode_server(model, kv_memory="64MiB") as (_, _, large),
        prefill_server(model, [small, large]) as (_, _, port),
    ):
        results = [generate_on(port, max_tokens=400) for _ in range(2)]
    assert results == [f"127.0.0.1:{large}"] * 2


def test_a_peer_of_another_model_is_refused_by_field(tiny_directories: dict[str, Path]) -> None:
    with (
        decode_server(tiny_directories["qwen3"]) as (_, _, decode_port),
        prefill_server(tiny_directories["llama"], [decode_port]) as (_, _, port),
        pytest.raises(FailedPreconditionError, match=r"qwen3 on decode and llama on prefill.*head_dim"),
    ):
        generate_on(port)


@pytest.mark.parametrize(
    ("spoil", "code", "sentence"),
    [
        (lambda begin: begin.model.__setattr__("rope_digest", "0" * 64), "FAILED_PRECONDITION", "rope_digest"),
        (
            lambda begin: begin.model.parameters.__setitem__("sliding_window", "7"),
            "FAILED_PRECONDITION",
            "sliding_window is none on decode and 7 on prefill",
        ),
        (lambda begin: begin.codec.__setattr__("version", 9), "FAILED_PRECONDITION", "version 1, prefill 9"),
        (lambda begin: begin.codec.__setattr__("name", "zip"), "FAILED_PRECONDITION", "'zip'.*absmax"),
        (lambda begin: begin.prompt_token_ids.__delitem__(slice(None)), "INVALID_ARGUMENT", "no prompt tokens"),
        (lambda begin: begin.prompt_token_ids.append(10**6), "INVALID_ARGUMENT", "1000000"),
        (lambda begin: begin.model.__setattr__("layers", 0), "INVALID_ARGUMENT", "layers"),
        (lambda begin: begin.sampling.__setattr__("temperature", math.inf), "INVALID_ARGUMENT", "temperature"),
    ],
)
def test_decode_checks_begin(
    llama_pair: Pair, spoil: Callable[[decode_pb2.Begin], None], code: str, sentence: str
) -> None:
    begin = decode_pb2.Begin(
        model=llama_pair.prefill.spec.to_proto(), codec={"name": "absmax", "version": 1}, prompt_token_ids=[1, 2]
    )
    spoil(begin)
    with open_channel(f"127.0.0.1:{llama_pair.decode_port}") as channel:
        decode = open_decode_stream(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(decode(iter([decode_pb2.DecodeRequest(begin=begin)]), timeout=10))
    assert caught.value.code().name == code
    assert pytest.approx(0) == total(llama_pair.decode_metrics, "kv_bytes_resident")
    assert re.search(sentence, caught.value.details())


def test_services_without_file_descriptors_say_what_they_serve(llama_pair: Pair) -> None:
    with llama_pair.client() as client:
        before = client.server_info()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                os.dup(0)
            assert client.server_info() == before
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def generate_on(port: int, max_tokens: int = 8) -> str:
    """Generate a few tokens; return the decode worker that served them."""
    with SpectrumClient(f"127.0.0.1:{port}") as client:
        stream = client.generate(TokenIds((1, 2, 3)), sampling=Sampling(max_tokens=max_tokens, ignore_eos=True))
        return stream.result().usage.decode_worker
