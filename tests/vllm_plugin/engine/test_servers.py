"""What users see of two vLLM servers with the connector: the right numbers, few bytes, no computation, no leaks."""

import math
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.vllm_plugin.engine.conftest import BUDGET, Server, Servers, wait_for

PROMPT_TOKENS, GENERATED = 320, 8
# Prefill computes a prompt in chunks and decode token by token: float32 sums differ in their last bits.
LAST_BITS = 2e-3
ITERATIONS = "vllm:iteration_tokens_total_sum"
ids: Iterator[int] = iter(range(1000, 1 << 20))


def prompt(tokens: int = PROMPT_TOKENS) -> list[int]:
    """A prompt that no other test sends, so that prefix caches hold nothing of it."""
    seed = next(ids)
    return [3 + (seed * 7919 + position * 104729) % 40000 for position in range(tokens)]


def logprobs(answer: dict[str, Any]) -> list[float]:
    found: list[float] = answer["choices"][0]["logprobs"]["token_logprobs"]
    return found


def prefilled(servers: Servers, tokens: list[int], **params: Any) -> tuple[list[int], dict[str, Any]]:
    """The prompt with prefill's first token, and the parameters for decode."""
    wanted = {"do_remote_decode": True, "transfer_id": f"test-{next(ids)}"} | params
    answer = servers.prefill.complete(tokens, 1, kv_transfer_params=wanted)
    return [*tokens, *answer["choices"][0]["token_ids"]], answer["kv_transfer_params"]


def computed(server: Server) -> float:
    return server.metric(ITERATIONS)


def close(one: list[float], other: list[float], tolerance: float = LAST_BITS) -> bool:
    return len(one) == len(other) and all(
        math.isclose(a, b, abs_tol=tolerance) for a, b in zip(one, other, strict=True)
    )


def test_native_continues_as_if_decode_had_computed_the_prompt(servers: Servers) -> None:
    asked, params = prefilled(servers, prompt(), policy="native")
    before = computed(servers.decode)
    answer = servers.decode.complete(asked, GENERATED, kv_transfer_params=params)
    # A step may be scheduled ahead of a request's end.
    assert GENERATED <= computed(servers.decode) - before <= GENERATED + 2
    exact = servers.prefill.complete(asked, GENERATED)
    assert close(logprobs(answer), logprobs(exact))


def test_a_budget_is_kept_and_nothing_is_computed_again(servers: Servers) -> None:
    asked, params = prefilled(servers, prompt())
    assert (params["policy"], params["budget"]) == ("spectral", BUDGET)
    before = computed(servers.decode), servers.decode.metric("spectrumkv:kv_bytes_fetched_total", "spectral")
    servers.decode.complete(asked, GENERATED, kv_transfer_params=params)
    assert computed(servers.decode) - before[0] <= GENERATED + 2
    fetched = servers.decode.metric("spectrumkv:kv_bytes_fetched_total", "spectral") - before[1]
    layers, kv_heads, head_dim = 3, 2, 64
    assert 0 < fetched <= BUDGET * layers * 2 * kv_heads * head_dim * PROMPT_TOKENS * 2


def test_a_prefix_hit_on_prefill_hands_out_the_whole_prompt(servers: Servers) -> None:
    tokens = prompt()
    prefilled(servers, tokens, policy="native")
    asked, params = prefilled(servers, tokens, policy="native")
    assert params["remote_prefill_cached_tokens"] > 0
    answer = servers.decode.complete(asked, GENERATED, kv_transfer_params=params)
    assert close(logprobs(answer), logprobs(servers.prefill.complete(asked, GENERATED)))


def test_decodes_prefix_cache_keeps_lossy_kv_from_exact_requests(servers: Servers) -> None:
    tokens = prompt()
    asked, lossy = prefilled(servers, tokens, budget=0.06)
    coarse = servers.decode.complete(asked, GENERATED, kv_transfer_params=lossy)
    asked_again, exact = prefilled(servers, tokens, policy="native")
    assert asked_again == asked
    answer = servers.decode.complete(asked, GENERATED, kv_transfer_params=exact)
    reference = servers.prefill.complete(asked, GENERATED)
    assert close(logprobs(answer), logprobs(reference))
    assert not close(logprobs(coarse), logprobs(reference))


def announce(servers: Servers, params: dict[str, Any], prefetch: str) -> None:
    """Announce a transfer as the proxy does, or take that back."""
    told = {name: params[name] for name in ("remote_host", "remote_port", "remote_ranks", "transfer_id")}
    servers.decode.complete([1], 1, kv_transfer_params=told | {"do_remote_prefill": True, "prefetch": prefetch})


def prefetches(servers: Servers, outcome: str) -> float:
    return servers.decode.metric("spectrumkv:kv_prefetches_total", outcome)


@pytest.mark.parametrize(("policy", "budget"), [("native", 1.0), ("spectral", BUDGET)])
def test_kv_that_was_announced_before_prefill_is_used_by_its_request(
    servers: Servers, policy: str, budget: float
) -> None:
    _, address = prefilled(servers, prompt(), policy="native")
    transfer_id, used = f"announced-{next(ids)}", prefetches(servers, "used")
    announce(servers, address | {"transfer_id": transfer_id}, "begin")
    asked, params = prefilled(servers, prompt(), policy=policy, budget=budget, transfer_id=transfer_id)
    before = computed(servers.decode)
    answer = servers.decode.complete(asked, GENERATED, kv_transfer_params=params)
    assert computed(servers.decode) - before <= GENERATED + 2
    wait_for(lambda: prefetches(servers, "used") > used, 15)
    if policy == "native":
        assert close(logprobs(answer), logprobs(servers.prefill.complete(asked, GENERATED)))


def test_an_announcement_that_is_taken_back_gives_its_transfer_up(servers: Servers) -> None:
    asked, params = prefilled(servers, prompt(), policy="native")
    cancelled = prefetches(servers, "cancelled")
    announce(servers, params, "begin")
    announce(servers, params, "drop")

    def counted() -> bool:
        # An engine tells its counts in steps.
        servers.decode.complete([1], 1)
        return prefetches(servers, "cancelled") > cancelled

    wait_for(counted, 15)
    before = computed(servers.decode)
    servers.decode.complete(asked, 1, kv_transfer_params=params)
    assert computed(servers.decode) - before >= PROMPT_TOKENS


def test_several_requests_at_once_do_not_mix(servers: Servers) -> None:
    def one(number: int) -> tuple[list[float], list[float]]:
        asked, params = prefilled(servers, prompt(150 + 37 * number), policy="native")
        answer = servers.decode.complete(asked, GENERATED, kv_transfer_params=params)
        return logprobs(answer), logprobs(servers.prefill.complete(asked, GENERATED))

    with ThreadPoolExecutor(4) as pool:
        assert all(close(*pair) for pair in pool.map(one, range(4)))


def test_several_completions_fetch_one_transfer(servers: Servers) -> None:
    tokens = prompt()
    _, params = prefilled(servers, tokens, policy="native", fetches=3)
    before = servers.decode.metric("spectrumkv:kv_loads_failed_total")
    answer = servers.decode.complete(tokens, 2, n=3, temperature=1, kv_transfer_params=params)
    assert len(answer["choices"]) == 3
    assert servers.decode.metric("spectrumkv:kv_loads_failed_total") == before


def test_kv_that_is_gone_fails_the_request_and_not_the_server(servers: Servers) -> None:
    asked, params = prefilled(servers, prompt())
    servers.decode.complete(asked, 1, kv_transfer_params=params)
    # Under another salt, prefill's own prefix cache does not have the prompt.
    with pytest.raises(urllib.error.HTTPError) as refused:
        servers.prefill.complete(asked, GENERATED, kv_transfer_params=params)
    assert refused.value.code == 500
    assert servers.prefill.metric("spectrumkv:kv_loads_failed_total", "not_found") >= 1
    assert len(logprobs(servers.prefill.complete(prompt(), 2))) == 2


def test_kv_that_is_gone_is_recomputed_where_that_is_the_policy(servers: Servers) -> None:
    asked, params = prefilled(servers, prompt())
    servers.decode.complete(asked, 1, kv_transfer_params=params)
    before = computed(servers.decode)
    gone = params | {"budget": 0.31}
    answer = servers.decode.complete(asked, GENERATED, kv_transfer_params=gone)
    assert computed(servers.decode) - before >= PROMPT_TOKENS
    assert close(logprobs(answer), logprobs(servers.prefill.complete(asked, GENERATED)))


def test_a_client_that_leaves_while_kv_is_awaited_leaves_nothing(servers: Servers) -> None:
    asked, params = prefilled(servers, prompt())
    never = params | {"transfer_id": "never", "budget": 0.29}
    with pytest.raises(TimeoutError):
        servers.decode.post("/v1/completions", {"model": "tiny", "prompt": asked, "kv_transfer_params": never}, 2)
    wait_for(lambda: servers.decode.metric("spectrumkv:kv_loads_failed_total", "cancelled") >= 1, 15)
    wait_for(lambda: servers.decode.metric("vllm:kv_cache_usage_perc") == 0, 15)
    servers.decode.complete(asked, 1, kv_transfer_params=params)


def test_what_cannot_be_kept_falls_back_to_exact_kv(servers: Servers) -> None:
    asked, params = prefilled(servers, prompt(), policy="pdtrim", budget=0.5)
    answer = servers.decode.complete(asked, GENERATED, kv_transfer_params=params)
    assert close(logprobs(answer), logprobs(servers.prefill.complete(asked, GENERATED)))
    wait_for(lambda: servers.prefill.metric("spectrumkv:kv_fallbacks_total", "drops_tokens") >= 1, 15)


def test_kv_of_another_prompt_is_not_used(servers: Servers) -> None:
    _, params = prefilled(servers, prompt(), policy="native")
    other = prompt(PROMPT_TOKENS + 1)
    answer = servers.decode.complete(other, GENERATED, kv_transfer_params=params)
    assert close(logprobs(answer), logprobs(servers.prefill.complete(other, GENERATED)))


def test_what_nobody_fetches_is_dropped_in_time(servers: Servers) -> None:
    prefilled(servers, prompt())

    def counted() -> bool:
        # The outbox is looked through in each step.
        servers.prefill.complete(prompt(8), 1)
        return servers.prefill.metric("spectrumkv:kv_transfers_orphaned_total") >= 1

    wait_for(counted, 45)
