"""The same over a model that vLLM compiles, in bfloat16: one server that hands KV out and takes it in."""

from collections.abc import Iterator

import pytest

from tests.vllm_plugin.engine.conftest import BUDGET, READY_SECONDS, Server, serving, wait_for
from tests.vllm_plugin.engine.test_servers import (
    GENERATED,
    PROMPT_TOKENS,
    Servers,
    close,
    computed,
    logprobs,
    prefilled,
    prompt,
)

# Sums of bfloat16 products in another order: prefill computes a prompt in chunks, and decode token by token.
BFLOAT16 = 0.15


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("compiled")
    with serving("kv_both", folder, "fail", "--dtype", "bfloat16", "--no-enforce-eager") as started:
        wait_for(lambda: started.is_ready, READY_SECONDS, folder)
        log = next(folder.glob("*.log")).read_text(errors="replace")
        assert "dtype=torch.bfloat16" in log
        assert "torch_aot_compile" in log
        yield started


def test_native_is_bit_for_bit_what_the_same_server_computed(server: Server) -> None:
    both, tokens = Servers(server, server), prompt()
    asked, params = prefilled(both, tokens, policy="native")
    # Its prefix cache would spare the load.
    before = computed(server)
    answer = server.complete(asked, GENERATED, kv_transfer_params=params, cache_salt="loaded")
    assert computed(server) - before <= GENERATED + 2
    assert close(logprobs(answer), logprobs(server.complete(asked, GENERATED, cache_salt="exact")), BFLOAT16)


def test_a_budget_is_kept_over_compiled_layers(server: Server) -> None:
    both = Servers(server, server)
    asked, params = prefilled(both, prompt(), policy="spectral", budget=BUDGET)
    before = computed(server), server.metric("spectrumkv:kv_bytes_fetched_total", "spectral")
    answer = server.complete(asked, GENERATED, kv_transfer_params=params, cache_salt="loaded")
    assert computed(server) - before[0] <= GENERATED + 2
    fetched = server.metric("spectrumkv:kv_bytes_fetched_total", "spectral") - before[1]
    layers, kv_heads, head_dim = 3, 2, 64
    assert 0 < fetched <= BUDGET * layers * 2 * kv_heads * head_dim * PROMPT_TOKENS * 2
    assert len(logprobs(answer)) == GENERATED
    assert server.metric("spectrumkv:kv_fallbacks_total") == 0
