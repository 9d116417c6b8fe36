"""A model that computes infinities or NaN is the service's fault, whatever the request asked for."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from spectrumkv.client.request import KvChoice, Sampling, TokenIds
from spectrumkv.common.errors import InternalError
from tests.services.pair import Pair, sample, wait_until_nothing_is_held

PROMPT = TokenIds(tuple(range(100, 164)))
GREEDY = Sampling(max_tokens=4, ignore_eos=True, seed=5)


@contextmanager
def broken_layer(pair: Pair, layer: int, value: float) -> Iterator[None]:
    """Have one layer of prefill's model compute what is no number, for as long as the block runs."""
    weight = pair.prefill.model.get_parameter(f"model.layers.{layer}.input_layernorm.weight")
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def answer(pair: Pair, kv: KvChoice) -> tuple[int, ...]:
    with pair.client() as client:
        return tuple(token.token_id for token in client.generate(PROMPT, sampling=GREEDY, kv=kv).result().tokens)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "kv",
    [
        KvChoice(),
        KvChoice(policy="spectral", scorer="random"),
        KvChoice(policy="adaptive"),
        KvChoice(policy="greedy", scope="model"),
        KvChoice(policy="uniform-int4"),
        KvChoice(policy="uniform-int8"),
        KvChoice(policy="fp16"),
        KvChoice(policy="native"),
    ],
    ids=lambda kv: f"{kv.policy}-{kv.scorer}-{kv.scope}",
)
def test_a_model_that_computes_no_numbers_is_the_services_fault(
    llama_pair: Pair, kv: KvChoice, value: float, caplog: pytest.LogCaptureFixture
) -> None:
    expected = answer(llama_pair, kv)
    before = sample(llama_pair.prefill_metrics, "requests_total", code="INTERNAL")
    for layer in (0, 1):
        caplog.clear()
        with (
            caplog.at_level(logging.WARNING),
            broken_layer(llama_pair, layer, value),
            pytest.raises(InternalError, match=r"infinite|NaN|finite"),
        ):
            answer(llama_pair, kv)
        wait_until_nothing_is_held(llama_pair.prefill_metrics, llama_pair.decode_metrics, seconds=10)
        [line] = [one for one in caplog.records if getattr(one, "fields", {}).get("service") == "PrefillService"]
        assert line.levelno == logging.WARNING
        assert line.fields["code"] == "INTERNAL"
    assert sample(llama_pair.prefill_metrics, "requests_total", code="INTERNAL") == before + 2
    assert answer(llama_pair, kv) == expected
