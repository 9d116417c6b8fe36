"""KV that cannot leave keeps further prompts from starting, instead of piling up on prefill."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from spectrumkv.client.request import Sampling, TokenIds
from spectrumkv.common.errors import CancelledError, DeadlineExceededError, InvalidArgumentError
from spectrumkv.prefill_server.transfer.pipeline import KvPipeline
from tests.services.kv.test_lossless import random_prompt
from tests.services.pair import Pair, running_pair, sample, wait_until_nothing_is_held
from tests.waiting import until

PROMPT_TOKENS = 200
FIRST_TOKEN = Sampling(max_tokens=2, ignore_eos=True)


@pytest.fixture(scope="module")
def narrow_pair(tiny_directories: dict[str, Path]) -> Iterator[Pair]:
    """Prefill has memory for the KV of two prompts."""
    options = {"prefill_kv_memory": str(2 * PROMPT_TOKENS * 3072)}
    with running_pair(tiny_directories["llama"], decode={"kv_memory": "64MiB"}, prefill=options) as pair:
        geometry = pair.prefill.geometry
        assert geometry.layers * geometry.native_bytes_per_token_layer == 3072
        yield pair


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing is sent to decode before this is set."""
    is_open = threading.Event()
    account = KvPipeline._account

    def hold(self: KvPipeline, *arguments: Any) -> None:
        if self.first_tokens or self.sent.message_bytes:
            is_open.wait(20)
        account(self, *arguments)

    monkeypatch.setattr(KvPipeline, "_account", hold)
    yield is_open
    is_open.set()


def test_prompts_start_as_their_kv_fits(narrow_pair: Pair, link: threading.Event) -> None:
    pair = narrow_pair

    def ask() -> int:
        with pair.client() as client:
            return len(
                client.generate(TokenIds(tuple(random_prompt(PROMPT_TOKENS))), sampling=FIRST_TOKEN).result().tokens
            )

    with ThreadPoolExecutor(5) as clients, ExitStack() as at_end:
        at_end.callback(link.set)
        asked = [clients.submit(ask) for _ in range(5)]
        until(lambda: sample(pair.prefill_metrics, "requests_waiting") == 3)
        until(lambda: sample(pair.prefill_metrics, "requests_running") == 2)
        assert sample(pair.prefill_metrics, "kv_bytes_resident") <= 2 * PROMPT_TOKENS * 3072
        # Those that wait hold no slots of decode: only two requests do.
        reserved = 2 * (PROMPT_TOKENS + FIRST_TOKEN.max_tokens) * 3072
        until(lambda: sample(pair.decode_metrics, "kv_bytes_resident") == reserved)
        with pair.client() as client:
            late = client.generate(TokenIds((5, 6, 7)), sampling=FIRST_TOKEN)
            until(lambda: sample(pair.prefill_metrics, "requests_waiting") == 4)
            assert sample(pair.decode_metrics, "kv_bytes_resident") == reserved
            late.cancel()
            with pytest.raises(CancelledError):
                late.result()
        until(lambda: sample(pair.prefill_metrics, "requests_waiting") == 3)
        link.set()
        assert [one.result(20) for one in asked] == [2] * 5
    wait_until_nothing_is_held(pair.prefill_metrics, pair.decode_metrics, seconds=10)


def test_a_prompt_whose_kv_never_fits_is_refused_before_anything_is_held(narrow_pair: Pair) -> None:
    pair = narrow_pair
    tokens = 2 * PROMPT_TOKENS + 1
    with pair.client() as client, pytest.raises(InvalidArgumentError) as caught:
        client.generate(TokenIds(tuple(random_prompt(tokens))), sampling=FIRST_TOKEN).result()
    assert caught.value.message.startswith(f"the prompt has {tokens} tokens, whose KV takes {tokens * 3072} bytes; ")
    assert caught.value.message.endswith(f"(--prefill-kv-memory): send at most {2 * PROMPT_TOKENS} tokens")
    assert sample(pair.decode_metrics, "kv_bytes_resident") == 0


def test_requests_that_end_while_they_wait_or_send_leave_nothing(narrow_pair: Pair, link: threading.Event) -> None:
    """By cancel and by deadline, one that holds memory and those behind it, and several answers to one prompt."""
    pair = narrow_pair
    prompt = TokenIds(tuple(random_prompt(2 * PROMPT_TOKENS)))
    with pair.client() as client, ExitStack() as at_end:
        at_end.callback(link.set)
        first = client.generate(prompt, sampling=FIRST_TOKEN)
        until(lambda: sample(pair.prefill_metrics, "requests_running") == 1)
        late = client.generate(prompt, sampling=FIRST_TOKEN, timeout=0.5)
        cancelled = client.generate(prompt, sampling=Sampling(max_tokens=2, ignore_eos=True, n=8))
        small = client.generate(TokenIds((5, 6, 7)), sampling=FIRST_TOKEN)
        until(lambda: sample(pair.prefill_metrics, "requests_waiting") == 3)
        with pytest.raises(DeadlineExceededError):
            late.result()
        until(lambda: sample(pair.prefill_metrics, "requests_waiting") == 2)
        cancelled.cancel()
        until(lambda: sample(pair.prefill_metrics, "requests_waiting") == 1)
        first.cancel()
        # The link is still held: only what is in prefill gave the memory back.
        until(lambda: sample(pair.prefill_metrics, "requests_waiting") == 0)
        link.set()
        assert len(small.result().tokens) == 2
    wait_until_nothing_is_held(pair.prefill_metrics, pair.decode_metrics, seconds=10)
