import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.prefill_server.tuning.needle.prompt import needle_prompt

CONTEXTS = (300, 777, 1024, 2048, 4096)


@settings(max_examples=8)
@given(context=st.sampled_from(CONTEXTS), depth=st.floats(0, 1), needle=st.integers(0, 50))
def test_a_prompt_fills_its_context_to_less_than_a_sentence(
    tokenizer: PreTrainedTokenizerFast, context: int, depth: float, needle: int
) -> None:
    prompt = needle_prompt(tokenizer, context, depth, needle)
    # The longest sentence has 344 characters; a tokenizer of words makes far fewer tokens of it.
    longest = 345 if len(tokenizer) < 1000 else 90
    assert context - longest < len(prompt.token_ids) <= context
    assert prompt.question_ids == ()


@settings(max_examples=8)
@given(context=st.sampled_from(CONTEXTS), depth=st.floats(0, 1), needle=st.integers(0, 50))
def test_a_prompt_holds_its_needle_once_then_the_question(
    tokenizer: PreTrainedTokenizerFast, context: int, depth: float, needle: int
) -> None:
    prompt = needle_prompt(tokenizer, context, depth, needle)
    text = tokenizer.decode(prompt.token_ids)
    assert text.count(prompt.fact.answer) == 1
    assert text.index(prompt.fact.sentence) < text.index(prompt.fact.question)
    assert text.endswith(prompt.fact.lead)


@settings(max_examples=8)
@given(context=st.sampled_from(CONTEXTS), depth=st.floats(0, 1), needle=st.integers(0, 50))
def test_the_late_question_gives_the_same_tokens_in_two_pieces(
    tokenizer: PreTrainedTokenizerFast, context: int, depth: float, needle: int
) -> None:
    early = needle_prompt(tokenizer, context, depth, needle)
    late = needle_prompt(tokenizer, context, depth, needle, "late")
    assert late.token_ids + late.question_ids == early.token_ids
    assert late.fact == early.fact
    assert late.fact.question not in tokenizer.decode(late.token_ids)
    assert late.fact.answer in tokenizer.decode(late.token_ids)
    question = tokenizer.decode(late.question_ids)
    assert late.fact.question in question
    assert question.endswith(late.fact.lead)


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_the_needle_is_at_its_depth_in_tokens(tokenizer: PreTrainedTokenizerFast, depth: float) -> None:
    prompt = needle_prompt(tokenizer, 2048, depth, 0, "late")
    text = tokenizer.decode(prompt.token_ids)
    before = len(tokenizer.encode(text[: text.index(prompt.fact.lead)], add_special_tokens=False))
    # Sentences are up to 90 tokens long, a template's own words up to 30; a token of bytes is a character.
    slack = 300 if len(tokenizer) < 1000 else 75
    assert abs(before - depth * len(prompt.token_ids)) < slack


def test_the_chat_template_is_used_where_there_is_one(chat: PreTrainedTokenizerFast) -> None:
    text = chat.decode(needle_prompt(chat, 512, 0.5, 0).token_ids)
    assert text.startswith("<|im_start|>system\n")
    assert text.count("<|im_start|>user\n") == 1
    assert "<|im_end|>\n<|im_start|>assistant\nThe secret number of" in text


def test_plain_text_starts_as_the_tokenizer_starts_texts(chat: PreTrainedTokenizerFast) -> None:
    plain = copy.deepcopy(chat)
    plain.chat_template = None
    assert needle_prompt(plain, 400, 0.5, 0).token_ids[0] != plain.bos_token_id
    plain.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{plain.bos_token} $A", special_tokens=[(plain.bos_token, plain.bos_token_id)]
    )
    for question in ("prompt", "late"):
        prompt = needle_prompt(plain, 400, 0.5, 0, question)
        assert prompt.token_ids[0] == plain.bos_token_id
        assert plain.bos_token_id not in prompt.token_ids[1:] + prompt.question_ids


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("56002.", True), (" is 56,002, as the text says.", True), ("56002 or 12345", True),
        ("It is 560021.", False), ("156002", False), ("12345 or 56002", False), ("5600 2", False), ("", False),
        ("no number", False),
    ],
)  # fmt: skip
def test_only_the_first_number_counts(chat: PreTrainedTokenizerFast, answer: str, right: bool) -> None:
    prompt = needle_prompt(chat, 300, 0.5, 0)
    assert prompt.fact.answer == "56002"
    assert prompt.is_answered_by(answer) is right


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((64, 0.5, 0), "do not fit 64 tokens"),
        ((50_000, 0.5, 0), "does not fill 50000 tokens"),
        ((1024, -0.1, 0), "depth is -0.1"),
        ((1024, float("nan"), 0), "depth is nan"),
        ((1024, 0.5, -1), "index is -1"),
        ((1024, 0.5, 0, "early"), "allowed: prompt, late"),
    ],
)
def test_what_cannot_be_is_refused(chat: PreTrainedTokenizerFast, arguments: tuple[object, ...], named: str) -> None:
    with pytest.raises(InvalidArgumentError, match=named):
        needle_prompt(chat, *arguments)


@pytest.mark.parametrize(
    "template",
    [
        "{% if (tools|length) > 0 %}x{% endif %}",
        "{{ raise_exception('no') }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[0].content | upper }}",
        "{% for one in",
    ],
)
def test_a_template_that_does_not_work_leaves_plain_text(chat: PreTrainedTokenizerFast, template: str) -> None:
    broken, plain = copy.deepcopy(chat), copy.deepcopy(chat)
    broken.chat_template, plain.chat_template = template, None
    for question in ("prompt", "late"):
        assert needle_prompt(broken, 777, 0.5, 0, question) == needle_prompt(plain, 777, 0.5, 0, question)
