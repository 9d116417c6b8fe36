from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from spectrumkv.common.errors import CancelledError, InternalError, InvalidArgumentError
from spectrumkv.common.generation.prompt import PIECE_CHARACTERS, PromptReader, check_length
from spectrumkv.v1 import prefill_pb2
from tests.common.generation.tokenizers_for_tests import byte_fallback, byte_level, metaspace
from tests.common.generation.tokenizers_for_tests import byte_level as make_byte_level

VOCAB = 49152


CONTEXT = 8192


def read_prompt(
    request_: prefill_pb2.GenerateRequest, tokenizer: PreTrainedTokenizerFast, vocab_size: int
) -> list[int]:
    return PromptReader(tokenizer, vocab_size, CONTEXT).read(request_)


def text(prompt: str) -> prefill_pb2.GenerateRequest:
    return prefill_pb2.GenerateRequest(text=prompt)


def chat(*messages: tuple[str, str]) -> prefill_pb2.GenerateRequest:
    listed = [prefill_pb2.ChatMessage(role=role, content=content) for role, content in messages]
    return prefill_pb2.GenerateRequest(chat=prefill_pb2.ChatMessages(messages=listed))


def token_ids(*ids: int) -> prefill_pb2.GenerateRequest:
    return prefill_pb2.GenerateRequest(token_ids=prefill_pb2.TokenIds(ids=ids))


@pytest.fixture
def templated() -> PreTrainedTokenizerFast:
    """A tokenizer whose template refuses a system message, as Gemma's does."""
    tokenizer = make_byte_level()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "{{ message.role }}: {{ message.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    return tokenizer


def test_text_is_tokenized_as_it_stands(embedded: PreTrainedTokenizerFast) -> None:
    for prompt in ("Once upon a time", " ", "\n", "日本 👩‍👧", "<|im_start|>user\nhi<|im_end|>"):
        read = read_prompt(text(prompt), embedded, VOCAB)
        assert read == embedded(prompt).input_ids
        assert embedded.decode(read) == prompt
    assert read_prompt(text("<|im_start|>"), embedded, VOCAB) == [1]


def test_text_gets_the_special_tokens_that_the_tokenizer_adds() -> None:
    tokenizer = make_byte_level()
    start = tokenizer.convert_tokens_to_ids("<s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    assert read_prompt(text("ab"), tokenizer, VOCAB) == [start, *tokenizer.convert_tokens_to_ids(["ab"])]
    with pytest.raises(InvalidArgumentError, match="text is empty"):
        read_prompt(text(""), tokenizer, VOCAB)


def test_chat_is_rendered_with_the_models_template(embedded: PreTrainedTokenizerFast) -> None:
    read = read_prompt(
        chat(("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "?")), embedded, VOCAB
    )
    assert embedded.decode(read) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_chat_has_the_start_token_once(templated: PreTrainedTokenizerFast) -> None:
    start = templated.convert_tokens_to_ids("<s>")
    templated.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    read = read_prompt(chat(("user", "ab")), templated, VOCAB)
    assert templated.decode(read) == "<s>user: ab\nassistant:"
    assert read.count(start) == 1


def test_a_template_that_refuses_says_why(templated: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InvalidArgumentError, match="chat template refuses these messages: System role not supported"):
        read_prompt(chat(("system", "x"), ("user", "y")), templated, VOCAB)


def test_a_model_without_a_template_says_so(byte_level: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InvalidArgumentError, match="no chat template; send the prompt as text or token_ids"):
        read_prompt(chat(("user", "y")), byte_level, VOCAB)


@pytest.mark.parametrize("role", ["Tool", "", "User"])
def test_unknown_roles_are_named(role: str, embedded: PreTrainedTokenizerFast) -> None:
    with pytest.raises(
        InvalidArgumentError, match=f"chat message 1 has the role '{role}'; allowed: system, user, ass"
    ):
        read_prompt(chat(("user", "y"), (role, "x")), embedded, VOCAB)


def test_a_long_text_is_read_like_a_short_one(embedded: PreTrainedTokenizerFast) -> None:
    for prompt in ("The quick brown fox. " * 1500, "x" * 40_000, "日本" * 3000, " " * 50_000):
        assert len(prompt) > PIECE_CHARACTERS or "日" in prompt
        read = PromptReader(embedded, VOCAB, 60_000).read(text(prompt))
        assert read == embedded(prompt).input_ids


def test_a_text_that_just_fits_is_read_and_a_longer_one_is_not(embedded: PreTrainedTokenizerFast) -> None:
    prompt = "7 " * 20_000
    tokens = len(embedded(prompt).input_ids)
    assert len(PromptReader(embedded, VOCAB, tokens).read(text(prompt))) == tokens
    with pytest.raises(InvalidArgumentError, match=r"has more than 20000 tokens; the model's context holds 20000"):
        PromptReader(embedded, VOCAB, 20_000).read(text(prompt))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (
            text("7" * 4000),
            r"has 4000 bytes, where no text that fits has more than \d{3,4}; the model's context holds 8",
        ),
        (chat(("user", "7" * 2000), ("user", "7" * 2000)), "has 4000 bytes"),
        (chat(*[("user", "")] * 9), "chat has 9 messages; the model's context holds 8 tokens: send fewer"),
        (token_ids(*[5] * 9), "has 9 tokens; the model's context holds 8"),
    ],
)
def test_what_cannot_fit_is_refused_before_it_is_tokenized(
    request_: prefill_pb2.GenerateRequest, message: str, embedded: PreTrainedTokenizerFast, monkeypatch: Any
) -> None:
    reader = PromptReader(embedded, VOCAB, 8)
    monkeypatch.setattr(type(embedded), "__call__", None)
    with pytest.raises(InvalidArgumentError, match=message):
        reader.read(request_)


def test_reading_ends_where_nobody_waits(embedded: PreTrainedTokenizerFast) -> None:
    def check() -> None:
        raise CancelledError("gone")

    with pytest.raises(CancelledError):
        PromptReader(embedded, VOCAB, 60_000).read(text("x" * 40_000), check)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if (tools|length) > 0 %}x{% endif %}", "template fails on these messages .TypeError: .*None"),
        ("{{ messages[0].content + 1 }}", "template fails on these messages .TypeError"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "template fails .* .RecursionError"),
        ("{{ 1 // 0 }}", "template fails .* .ZeroDivisionError"),
    ],
)
def test_a_template_that_fails_is_a_bad_argument(
    template: str, message: str, templated: PreTrainedTokenizerFast
) -> None:
    templated.chat_template = template
    with pytest.raises(InvalidArgumentError, match=message):
        read_prompt(chat(("user", "y")), templated, VOCAB)


def test_token_ids_are_taken_as_they_are(embedded: PreTrainedTokenizerFast) -> None:
    assert read_prompt(token_ids(0, 5, 5, VOCAB - 1), embedded, VOCAB) == [0, 5, 5, VOCAB - 1]


def test_the_first_bad_token_id_is_named_with_its_place(embedded: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InvalidArgumentError, match=r"token_ids\[2\] is 49152; allowed: 0 to 49151"):
        read_prompt(token_ids(1, 2, VOCAB, 2**32 - 1), embedded, VOCAB)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (prefill_pb2.GenerateRequest(), "has no prompt; set one of text, chat and token_ids"),
        (text(""), "the prompt's text is empty"),
        (chat(), "chat has no messages"),
        (token_ids(), "token_ids is empty"),
    ],
)
def test_an_empty_prompt_is_refused(
    request_: prefill_pb2.GenerateRequest, message: str, embedded: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        read_prompt(request_, embedded, VOCAB)


def test_text_that_comes_to_nothing_is_refused() -> None:
    tokenizer = make_byte_level()
    tokenizer.chat_template = "{% if false %}x{% endif %}"
    with pytest.raises(InvalidArgumentError, match="the prompt has no tokens; a prompt has at least one"):
        read_prompt(chat(("user", "x")), tokenizer, VOCAB)


def test_a_tokenizer_of_another_model_is_found_out(embedded: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InternalError, match=r"gave token id \d+, but the model's vocabulary has 300"):
        read_prompt(text("Hello wonderful world"), embedded, 300)


def test_prompts_are_read_by_many_threads_at_once(embedded: PreTrainedTokenizerFast) -> None:
    requests = [text(f"{number} bottles of beer " * 50) for number in range(64)]
    with ThreadPoolExecutor(8) as threads:
        read = list(threads.map(lambda one: read_prompt(one, embedded, VOCAB), requests))
    assert [embedded.decode(ids) for ids in read] == [one.text for one in requests]


@pytest.mark.parametrize(("prompt_tokens", "max_tokens"), [(1, 1), (99, 1), (1, 99), (50, 50)])
def test_what_fits_is_accepted(prompt_tokens: int, max_tokens: int) -> None:
    check_length(prompt_tokens, max_tokens, 100)


@pytest.mark.parametrize(
    ("prompt_tokens", "max_tokens", "remedy"),
    [
        (60, 41, "set max_tokens to 40 or less, or shorten the prompt to 59 tokens or less"),
        (60, 500, "set max_tokens to 40 or less$"),
        (100, 1, "shorten the prompt by 1 tokens or more"),
        (250, 30, "the prompt alone leaves no room for an answer: shorten the prompt by 180 tokens or more, fewer"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers_and_a_way_out(
    prompt_tokens: int, max_tokens: int, remedy: str
) -> None:
    numbers = (
        f"the prompt has {prompt_tokens} tokens and max_tokens is {max_tokens}, "
        f"together {prompt_tokens + max_tokens}; the model's context holds 100: "
    )
    with pytest.raises(InvalidArgumentError, match=numbers + remedy):
        check_length(prompt_tokens, max_tokens, 100)


@pytest.mark.parametrize("make", [byte_level, byte_fallback, metaspace], ids=lambda make: make.__name__)
def test_the_text_of_token_ids_is_that_of_the_prompt_and_each_keeps_its_space(make) -> None:
    tokenizer = make()
    reader = PromptReader(tokenizer, VOCAB, CONTEXT)
    ids = tokenizer("the the ab", add_special_tokens=False).input_ids
    whole, each = reader.text_of(ids)
    assert whole == tokenizer.decode(ids)
    assert "".join(each).strip() == "the the ab"
    assert len(each) == len(ids)


def test_special_tokens_and_halves_of_characters_have_a_text_too() -> None:
    tokenizer = byte_level()
    reader = PromptReader(tokenizer, VOCAB, CONTEXT)
    half = tokenizer("é", add_special_tokens=False).input_ids
    whole, each = reader.text_of([tokenizer.convert_tokens_to_ids("</s>"), *half])
    assert (whole, each) == ("</s>é", ["</s>", "\ufffd", "\ufffd"])
    assert reader.text_of([]) == ("", [])


def test_token_ids_that_the_model_does_not_have_have_no_text() -> None:
    reader = PromptReader(byte_level(), VOCAB, CONTEXT)
    with pytest.raises(InvalidArgumentError, match=f"token_ids\\[0\\] is {VOCAB}"):
        reader.text_of([VOCAB])
    with pytest.raises(InvalidArgumentError, match=f"{CONTEXT + 1} tokens"):
        reader.text_of([5] * (CONTEXT + 1))
