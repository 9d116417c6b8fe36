"""A prompt too large for the model costs little before it is refused, and nothing once its request is over."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from spectrumkv.client.client import SpectrumClient
from spectrumkv.client.request import Message, Prompt, Sampling
from spectrumkv.common.errors import CancelledError, InvalidArgumentError
from spectrumkv.common.rpc.scope import RpcScope
from tests.services.pair import Pair, prefill_server, total, wait_until_nothing_is_held

# The small models' context holds 2,048 tokens, and each digit is a token.
DIGITS = "7" * 200_000
# A token is up to 64 spaces or more, so that this fits and is counted in several pieces.
SPACES = " " * 60_000


class Watched:
    """What the service tokenizes, text by text; `during` runs inside each call."""

    def __init__(self) -> None:
        self.characters: list[int] = []
        self.during: Callable[[], None] = lambda: None

    def took(self, text: str) -> None:
        self.characters.append(len(text))
        self.during()


@pytest.fixture
def watched(llama_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    seen = Watched()
    kind = type(llama_pair.prefill.tokenizer)
    tokenize = kind.__call__

    def watch(self: Any, text: str, *arguments: Any, **options: Any) -> Any:
        seen.took(text)
        return tokenize(self, text, *arguments, **options)

    monkeypatch.setattr(kind, "__call__", watch)
    yield seen
    wait_until_nothing_is_held(llama_pair.prefill_metrics, seconds=10)


def refusal(pair: Pair, prompt: Prompt) -> str:
    with pair.client() as client, pytest.raises(InvalidArgumentError) as caught:
        client.generate(prompt, sampling=Sampling(max_tokens=1)).result()
    return str(caught.value)


def test_a_text_of_too_many_tokens_is_refused_at_the_piece_that_shows_it(llama_pair: Pair, watched: Watched) -> None:
    assert "more than 2048 tokens" in refusal(llama_pair, DIGITS)
    assert "more than 2048 tokens" in refusal(llama_pair, [Message("user", DIGITS)])
    assert sum(watched.characters) < 0.2 * 2 * len(DIGITS)


def test_a_text_of_too_many_bytes_and_too_many_messages_are_refused_unread(
    llama_pair: Pair, watched: Watched
) -> None:
    for prompt in (DIGITS * 4, [Message("user", DIGITS)] * 4):
        assert "bytes, where no text that fits has more" in refusal(llama_pair, prompt)
    assert "chat has 5000 messages" in refusal(llama_pair, [Message("user", "")] * 5000)
    assert not watched.characters


def test_a_request_that_is_refused_is_not_tried_again(llama_pair: Pair) -> None:
    before = total(llama_pair.prefill_metrics, "requests_total")
    refusal(llama_pair, DIGITS)
    assert total(llama_pair.prefill_metrics, "requests_total") == before + 1


def test_a_request_that_is_refused_goes_to_no_other_prefill(
    llama_pair: Pair, tiny_directories: dict[str, Path]
) -> None:
    with prefill_server(tiny_directories["llama"], [llama_pair.decode_port]) as (_, other, port):
        before = total(llama_pair.prefill_metrics, "requests_total")
        both = f"127.0.0.1:{llama_pair.prefill_port},127.0.0.1:{port}"
        with SpectrumClient(both) as client, pytest.raises(InvalidArgumentError, match="more than 2048 tokens"):
            client.generate(DIGITS, sampling=Sampling(max_tokens=1)).result()
        asked = total(llama_pair.prefill_metrics, "requests_total") - before + total(other, "requests_total")
        assert asked == 1


def test_few_long_texts_are_tokenized_at_once(llama_pair: Pair, watched: Watched) -> None:
    lock, most, inside = threading.Lock(), 0, 0
    third = threading.Event()

    def count() -> None:
        nonlocal most, inside
        with lock:
            inside += 1
            most = max(most, inside)
            if inside == 3:
                third.set()
        third.wait(0.05)
        with lock:
            inside -= 1

    watched.during = count
    with ThreadPoolExecutor(6) as clients:
        list(clients.map(lambda _: refusal(llama_pair, DIGITS), range(6)))
    assert most == 2


def test_a_text_that_nobody_waits_for_is_left(
    llama_pair: Pair, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    scopes: list[RpcScope] = []
    enter = RpcScope.__enter__
    monkeypatch.setattr(RpcScope, "__enter__", lambda self: scopes.append(self) or enter(self))  # type: ignore[func-returns-value]
    reached = threading.Event()

    def hold() -> None:
        reached.set()
        scopes[0].wait_for_end(10)

    watched.during = hold
    with llama_pair.client() as client:
        stream = client.generate(SPACES, sampling=Sampling(max_tokens=1))
        assert reached.wait(10)
        stream.cancel()
        with pytest.raises(CancelledError):
            stream.result()
    wait_until_nothing_is_held(llama_pair.prefill_metrics, seconds=10)
    assert sum(watched.characters) < len(SPACES)


def test_a_short_prompt_does_not_wait_for_long_ones(llama_pair: Pair, watched: Watched) -> None:
    both, go_on = threading.Barrier(3), threading.Event()

    def hold() -> None:
        if watched.characters[-1] > 100:
            both.wait(10)
            go_on.wait(10)

    watched.during = hold
    with ThreadPoolExecutor(2) as clients:
        long = [clients.submit(refusal, llama_pair, DIGITS) for _ in range(2)]
        both.wait(10)
        with llama_pair.client() as client:
            assert client.generate("Hello", sampling=Sampling(max_tokens=1)).result().tokens
        go_on.set()
        assert all("more than" in one.result() for one in long)


def test_a_message_beyond_the_limit_of_grpc_is_refused_once(llama_pair: Pair) -> None:
    with llama_pair.client() as client, pytest.raises(InvalidArgumentError, match="larger than max") as caught:
        client.generate(" " * (9 << 20)).result()
    assert isinstance(caught.value.__cause__, grpc.RpcError)
