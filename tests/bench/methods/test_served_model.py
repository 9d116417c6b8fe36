"""The bench's forward passes are plain transformers' forward passes, KV aside."""

import pytest
import torch

from spectrumkv.bench.methods.method import REFERENCES, ExactFp16, Prompt, SentBytes, store_fp16
from spectrumkv.bench.methods.served_model import ServedModel, visible
from spectrumkv.common.model.load import load_model
from spectrumkv.decode_server.kv_pool import Allocation, KvPool
from tests.bench.conftest import CAPACITY, WINDOW, wire_method
from tests.services.kv.test_lossless import random_prompt
from tests.services.reference import assert_same_greedy, reference_model
from tests.tiny_models import ARCHITECTURES, SLIDING_WINDOW, tiny_model

CONTEXT, SCORED = 100, 24
# Longer than the sliding window, so that most of the context is out of the scored tokens' sight.
assert CONTEXT > 2 * SLIDING_WINDOW


class Drops:
    """Exact KV but for some dropped tokens, whose slots hold NaN before they are dropped."""

    policy = codec = scorer = scope = ""
    budget = 1.0

    def __init__(self, dropped: dict[int, list[int]]) -> None:
        self.dropped = dropped

    def send(self, prompt: Prompt, pool: KvPool, allocation: Allocation) -> SentBytes:
        for layer in prompt.captured.layers:
            store_fp16(allocation, layer.layer, layer.keys, layer.values, pool.geometry)
        for layer, positions in self.dropped.items():
            allocation.keys(layer, 0, CONTEXT)[:, positions] = torch.nan
            allocation.values(layer, 0, CONTEXT)[:, positions] = torch.nan
            allocation.drop(layer, torch.tensor(positions))
        return SentBytes(0, 0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scoring_is_the_forward_pass_of_the_whole_window(architecture: str) -> None:
    served = ServedModel(load_model(str(tiny_model(architecture)), "cpu", "auto"), WINDOW, CAPACITY)
    plain = reference_model(tiny_model(architecture), softcapped=architecture == "gemma2")
    ids = random_prompt(CONTEXT + SCORED)
    with torch.inference_mode():
        expected = plain(torch.tensor([ids]), use_cache=False).logits[0, CONTEXT:]
    prompt = served.prefill(ids[:CONTEXT])
    logits = {}
    for method in (wire_method(served, "native"), wire_method(served, "fp16"), *REFERENCES.values()):
        with served.receive(method, prompt) as (context, _):
            logits[method.policy, method.codec] = served.extend(context, ids[CONTEXT:])
            assert context.length == CONTEXT + SCORED
    torch.testing.assert_close(logits["native", "native"], expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(logits["fp16", "absmax"], expected, atol=1e-2 * float(expected.abs().max()), rtol=0)
    torch.testing.assert_close(logits["fp16", "absmax"], logits["exact", "fp16"], atol=0, rtol=0)
    torch.testing.assert_close(logits["native", "native"], logits["exact", "native"], atol=0, rtol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generation_over_received_kv_is_greedy_generation(architecture: str) -> None:
    served = ServedModel(load_model(str(tiny_model(architecture)), "cpu", "auto"), WINDOW, CAPACITY)
    ids = random_prompt(CONTEXT)
    prompt = served.prefill(ids)
    with served.receive(wire_method(served, "native"), prompt) as (context, _):
        tokens = list(served.generate(context, prompt.captured.first_token, 8))
    plain = reference_model(tiny_model(architecture), softcapped=architecture == "gemma2")
    assert len(tokens) == 8
    assert_same_greedy(plain, ids, tokens)


def test_reading_at_once_and_one_by_one_is_the_same(served: ServedModel) -> None:
    ids = random_prompt(CONTEXT + SCORED)
    prompt = served.prefill(ids[:CONTEXT])
    with served.receive(ExactFp16(), prompt) as (context, _):
        at_once = served.extend(context, ids[CONTEXT:])
    with served.receive(ExactFp16(), prompt) as (context, _):
        one_by_one = torch.cat([served.extend(context, [token]) for token in ids[CONTEXT:]])
    torch.testing.assert_close(at_once, one_by_one, atol=1e-3, rtol=0)


def test_what_is_dropped_in_a_layer_is_masked_in_that_layer_only(served: ServedModel) -> None:
    ids = random_prompt(CONTEXT + SCORED)
    prompt = served.prefill(ids[:CONTEXT])
    dropped = list(range(3, CONTEXT - 5))

    def logits(method: Drops) -> torch.Tensor:
        with served.receive(method, prompt) as (context, _):
            return served.extend(context, ids[CONTEXT:])

    nothing, first, both = logits(Drops({})), logits(Drops({0: dropped})), logits(Drops({0: dropped, 1: dropped}))
    assert (nothing - first).abs().max() > 0.1
    assert (both - first).abs().max() > 0.1
    # The slots are the same memory each time; nothing of an earlier method may show.
    torch.testing.assert_close(logits(Drops({})), nothing, atol=0, rtol=0)


@pytest.mark.parametrize("architecture", ["mistral", "gemma2", "gemma3_text"])
def test_tokens_behind_a_layers_window_are_never_read(architecture: str) -> None:
    served = ServedModel(load_model(str(tiny_model(architecture)), "cpu", "auto"), WINDOW, CAPACITY)
    ids = random_prompt(CONTEXT + SCORED)
    prompt = served.prefill(ids[:CONTEXT])
    # The first token that decode computes sees itself and the newest SLIDING_WINDOW - 1 tokens of the prompt.
    sliding = [layer for layer, one in enumerate(served.loaded.attention) if one.sliding_window is not None]
    behind = {layer: list(range(CONTEXT - SLIDING_WINDOW + 1)) for layer in sliding}
    logits = []
    for method in (
        Drops({}),
        Drops(behind),
        Drops({layer: [*tokens, len(tokens)] for layer, tokens in behind.items()}),
    ):
        with served.receive(method, prompt) as (context, _):
            logits.append(served.extend(context, ids[CONTEXT:]))
    torch.testing.assert_close(logits[1], logits[0], atol=0, rtol=0)
    assert (logits[2][0] - logits[0][0]).abs().max() > 0


@pytest.mark.parametrize("sliding_window", [None, 1, 3, 50])
def test_visibility_is_causal_within_the_window_and_leaves_out_what_was_dropped(sliding_window: int | None) -> None:
    start, end = 5, 9
    kept = torch.tensor([True, True, False, True, True, True, True, True, True, True, True])
    seen = visible(start, end, sliding_window, kept, torch.device("cpu"))
    for row in range(end - start):
        for position in range(end):
            distance = start + row - position
            expected = distance >= 0 and bool(kept[position]) and (not sliding_window or distance < sliding_window)
            assert bool(seen[row, position]) == expected
