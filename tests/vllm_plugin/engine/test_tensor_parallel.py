"""Engines of two ranks: each rank hands out and takes its own KV heads, whatever the degree of the other side."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.vllm_plugin.engine.conftest import BUDGET, READY_SECONDS, Server, Servers, serving, wait_for
from tests.vllm_plugin.engine.test_servers import (
    GENERATED,
    PROMPT_TOKENS,
    close,
    computed,
    logprobs,
    prefilled,
    prompt,
)

TWO_RANKS = ("--tensor-parallel-size", "2")
# Ranks of prefill and decode.
Degrees = tuple[int, int]

each_degree = pytest.mark.parametrize(
    "degrees", [(2, 1), (1, 2), (2, 2)], ids=lambda degrees: f"{degrees[0]} to {degrees[1]}"
)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Servers of two ranks each; what cannot be loaded fails."""
    folder = tmp_path_factory.mktemp("two-ranks")
    with ExitStack() as stopped:
        prefill, decode = (
            stopped.enter_context(serving(role, folder, "fail", *TWO_RANKS))
            for role in ("kv_producer", "kv_consumer")
        )
        wait_for(lambda: prefill.is_ready and decode.is_ready, READY_SECONDS, folder)
        yield Servers(prefill, decode)


@each_degree
def test_native_continues_as_one_rank_does(degrees: Degrees, servers: Servers, two_ranks: Servers) -> None:
    pair = pair_of(degrees, servers, two_ranks)
    asked, params = prefilled(pair, prompt(), policy="native")
    before = computed(pair.decode)
    answer = pair.decode.complete(asked, GENERATED, kv_transfer_params=params)
    assert GENERATED <= computed(pair.decode) - before <= GENERATED + 2
    assert close(logprobs(answer), logprobs(servers.prefill.complete(asked, GENERATED)))


@each_degree
def test_a_budget_is_kept_and_nothing_is_computed_again(
    degrees: Degrees, servers: Servers, two_ranks: Servers
) -> None:
    pair = pair_of(degrees, servers, two_ranks)
    asked, params = prefilled(pair, prompt())
    before = computed(pair.decode), fetched_bytes(pair.decode)
    pair.decode.complete(asked, GENERATED, kv_transfer_params=params)
    assert computed(pair.decode) - before[0] <= GENERATED + 2
    # Of two ranks that share a stream each fetches all of it.
    copies = 2 if degrees == (1, 2) else 1
    layers, kv_heads, head_dim = 3, 2, 64
    allowed = copies * BUDGET * layers * 2 * kv_heads * head_dim * PROMPT_TOKENS * 2
    assert 0 < fetched_bytes(pair.decode) - before[1] <= allowed


def pair_of(degrees: Degrees, servers: Servers, two_ranks: Servers) -> Servers:
    """Prefill and decode of so many ranks."""
    by_ranks = {1: servers, 2: two_ranks}
    return Servers(by_ranks[degrees[0]].prefill, by_ranks[degrees[1]].decode)


def fetched_bytes(server: Server) -> float:
    return server.metric("spectrumkv:kv_bytes_fetched_total", "spectral")
