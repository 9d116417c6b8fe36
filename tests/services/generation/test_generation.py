"""What crosses the hand-off besides KV: sampling state, text state, stops, log-probabilities, limits."""

import pytest
import torch

from spectrumkv.client.completion import Completion
from spectrumkv.client.request import KvChoice, Message, Prompt, Sampling, TokenIds
from tests.services.kv.test_lossless import random_prompt
from tests.services.pair import Pair, total
from tests.services.reference import reference_model

NATIVE = KvChoice(policy="native")


def complete(pair: Pair, prompt: Prompt, kv: KvChoice = NATIVE, **sampling: object) -> Completion:
    with pair.client() as client:
        return client.generate(prompt, sampling=Sampling(**sampling), kv=kv).result()


def prompt(length: int = 20) -> TokenIds:
    return TokenIds(tuple(random_prompt(length, seed=4)))


def test_the_first_token_is_index_0_and_comes_exactly_once(llama_pair: Pair) -> None:
    completion = complete(llama_pair, prompt(), max_tokens=12, ignore_eos=True)
    assert [token.index for token in completion.tokens] == list(range(12))
    assert completion.usage.completion_tokens == 12
    assert completion.finish_reason == "length"
    assert completion.usage.handoff_seconds > 0
    # The median of the gaps between the tokens that came from decode.
    assert 0 < total(llama_pair.prefill_metrics, "decode_worker_token_seconds") < 5


def test_one_token_needs_no_hand_off(llama_pair: Pair) -> None:
    full = complete(llama_pair, prompt(), max_tokens=3, ignore_eos=True)
    one = complete(llama_pair, prompt(), max_tokens=1, ignore_eos=True)
    assert [token.token_id for token in one.tokens] == [full.tokens[0].token_id]
    assert one.finish_reason == "length"
    assert one.usage.handoff_seconds == 0
    assert total(llama_pair.decode_metrics, "kv_bytes_resident") == 0


@pytest.mark.parametrize("position", [0, 1, 4])
def test_a_stop_token_ends_at_prefill_and_at_decode(llama_pair: Pair, position: int) -> None:
    full = complete(llama_pair, prompt(), max_tokens=8, ignore_eos=True)
    ids = [token.token_id for token in full.tokens]
    assert ids.index(ids[position]) == position
    stopped = complete(llama_pair, prompt(), max_tokens=8, ignore_eos=True, stop_token_ids=(ids[position],))
    assert [token.token_id for token in stopped.tokens] == ids[: position + 1]
    assert stopped.finish_reason == "stop"
    assert full.text.startswith(stopped.text)


def test_a_stop_string_may_span_the_hand_off(llama_pair: Pair) -> None:
    full = complete(llama_pair, prompt(), max_tokens=10, ignore_eos=True)
    pieces = [llama_pair.prefill.tokenizer.decode([token.token_id]) for token in full.tokens]
    spanning = pieces[0][-1] + pieces[1][:1]
    assert full.text.index(spanning) == len(pieces[0]) - 1
    stopped = complete(llama_pair, prompt(), max_tokens=10, ignore_eos=True, stop=(spanning,))
    assert stopped.text == pieces[0][:-1]
    assert stopped.finish_reason == "stop"
    assert len(stopped.tokens) == 2


def test_the_same_seed_gives_the_same_tokens(llama_pair: Pair) -> None:
    drawn = {"max_tokens": 20, "ignore_eos": True, "temperature": 1.0, "top_p": 0.95, "top_k": 100}
    runs = [complete(llama_pair, prompt(), seed=seed, **drawn) for seed in (7, 7, 8)]
    ids = [[token.token_id for token in run.tokens] for run in runs]
    assert ids[0] == ids[1]
    assert ids[0] != ids[2]


def test_log_probabilities_are_the_models_own(llama_pair: Pair) -> None:
    completion = complete(llama_pair, prompt(), max_tokens=6, ignore_eos=True, logprobs=3, temperature=0.7, seed=1)
    model = reference_model(llama_pair.prefill.model.config.name_or_path)
    ids = [*prompt().ids, *(token.token_id for token in completion.tokens)]
    with torch.inference_mode():
        logprobs = model(input_ids=torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)[len(prompt().ids) - 1 :]
    for row, token in zip(logprobs, completion.tokens, strict=True):
        assert token.logprob == pytest.approx(float(row[token.token_id]), abs=1e-3)
        assert [one.token_id for one in token.top_logprobs] == row.topk(3).indices.tolist()


def test_deltas_make_up_the_text(llama_pair: Pair) -> None:
    completion = complete(llama_pair, prompt(), max_tokens=60, ignore_eos=True, temperature=1.5, seed=3)
    tokenizer = llama_pair.prefill.tokenizer
    ids = [token.token_id for token in completion.tokens]
    assert "".join(token.text for token in completion.tokens) == tokenizer.decode(ids, skip_special_tokens=True)


def test_text_and_chat_are_read_like_the_tokenizer_reads_them(llama_pair: Pair) -> None:
    tokenizer = llama_pair.prefill.tokenizer
    text = "Rivers carry what towns forget."
    from_text = complete(llama_pair, text, max_tokens=5, ignore_eos=True)
    from_ids = complete(llama_pair, TokenIds(tuple(tokenizer(text).input_ids)), max_tokens=5, ignore_eos=True)
    assert from_text.text == from_ids.text
    messages = [{"role": "user", "content": "Hello"}]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    chat = complete(llama_pair, [Message("user", "Hello")], max_tokens=5, ignore_eos=True)
    assert chat.usage.prompt_tokens == len(rendered)
    assert chat.text == complete(llama_pair, TokenIds(tuple(rendered)), max_tokens=5, ignore_eos=True).text


def test_tiers_follow_the_probe(llama_pair: Pair) -> None:
    usage = complete(llama_pair, prompt(200), KvChoice(policy="adaptive", budget=0.3), max_tokens=2).usage
    assert {one.tier: one.tokens for one in usage.tiers} == {"int4": 160, "int8": 40}
    assert usage.budget_nominal == pytest.approx(0.3)
    # Scales are 2 bytes for 64 elements, of keys and of values: 1/64 of FP16 each.
    assert usage.budget_counted == pytest.approx(0.3 + 1 / 64, abs=0.01)
