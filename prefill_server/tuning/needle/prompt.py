"""Builds prompts of an exact length that hide a needle at an exact depth."""

import logging
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from transformers import PreTrainedTokenizerFast

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.prefill_server.tuning.needle.haystack import Fact, Haystack, fact, haystack

logger = logging.getLogger(__name__)

QUESTION_PLACES = ("prompt", "late")


@dataclass(frozen=True)
class NeedlePrompt:
    """Holds a long text with a needle in it, and the question for the needle.

    The question ends in the first words of its answer ("The secret number of the chapel in Arlen is"), so that the
    model's next words are the number, however talkative the model is.

    Attributes:
        token_ids: the prompt.
        question_ids: tokens that follow the prompt; empty where the prompt holds the question itself.
        fact: the needle.
        depth: where the needle is, from 0 (start) to 1 (end).
    """

    token_ids: tuple[int, ...]
    question_ids: tuple[int, ...]
    fact: Fact
    depth: float

    def is_answered_by(self, text: str) -> bool:
        """Return whether the first number in `text` is the answer; commas between digits do not matter."""
        numbers = re.findall(r"\d[\d,]*", text)
        return bool(numbers) and numbers[0].replace(",", "") == self.fact.answer


def needle_prompt(
    tokenizer: PreTrainedTokenizerFast,
    context_tokens: int,
    depth: float,
    needle_index: int,
    question: str = "prompt",
) -> NeedlePrompt:
    """Return a prompt that fills a context with prose and hides one fact in it.

    The prompt is rendered with the model's own chat template where there is one that works, and otherwise as plain
    text. Both places of the question give the same tokens, once in one piece and once in two.

    Args:
        tokenizer: the model's.
        context_tokens: most tokens that prompt and question take together. They take less by a part of a
            sentence, since sentences stay whole.
        depth: share of the prose that comes before the needle, from 0 to 1. The needle goes to the nearest end of a
            sentence.
        needle_index: number of the fact, from 0; the number also decides where the prose starts.
        question: "prompt" puts the question into the prompt. "late" keeps it apart, so that it can be asked once the
            prompt's KV cache has been cut down.

    Returns:
        A prompt of at most `context_tokens` tokens, the question included.

    Raises:
        InvalidArgumentError: an argument is out of its range, the context is too short for needle and question,
            or longer than the whole haystack.
    """
    _check(depth, needle_index, question)
    hidden, prose = fact(needle_index), haystack(needle_index)
    chat = _renders(tokenizer, hidden)

    def tokens(sentences: int) -> list[int]:
        before, after = _render(tokenizer, prose.first(sentences), hidden, depth, chat)
        return _encode(tokenizer, before + after, chat)

    counts = range(1, len(prose.sentences) + 1)
    sentences = bisect_right(counts, context_tokens, key=lambda count: len(tokens(count)))
    if sentences == 0:
        raise InvalidArgumentError(
            f"needle and question do not fit {context_tokens} tokens; this model needs {len(tokens(1))} at least"
        )
    if sentences == len(counts):
        raise InvalidArgumentError(
            f"the haystack does not fill {context_tokens} tokens; this model makes {len(tokens(sentences))} of it"
        )
    whole = tokens(sentences)
    before, _ = _render(tokenizer, prose.first(sentences), hidden, depth, chat)
    cut = len(whole) if question == "prompt" else _common_length(whole, _encode(tokenizer, before, chat))
    return NeedlePrompt(tuple(whole[:cut]), tuple(whole[cut:]), hidden, depth)


def _check(depth: float, needle_index: int, question: str) -> None:
    if not 0 <= depth <= 1:
        raise InvalidArgumentError(f"the needle's depth is {depth}; it must be from 0 to 1")
    if needle_index < 0:
        raise InvalidArgumentError(f"the needle's index is {needle_index}; it must not be negative")
    if question not in QUESTION_PLACES:
        raise InvalidArgumentError(f"the question is {question!r}; allowed: {', '.join(QUESTION_PLACES)}")


def _renders(tokenizer: PreTrainedTokenizerFast, hidden: Fact) -> bool:
    """Return whether the model has a chat template that takes a question and leaves it as it is."""
    if tokenizer.chat_template is None:
        return False
    try:
        asked = f"Once.\n\n{hidden.question}"
        return asked in _rendered(tokenizer, asked)
    except Exception as error:  # noqa: BLE001  # a template is a program of the model's makers
        logger.warning(
            "the model's chat template fails on a question (%s: %s); the prompt is plain text",
            type(error).__name__,
            error,
        )
        return False


def _rendered(tokenizer: PreTrainedTokenizerFast, content: str) -> str:
    # Qwen3's template takes `enable_thinking=False` to mean an answer at once; other templates ignore it.
    rendered: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    return rendered


def _render(
    tokenizer: PreTrainedTokenizerFast, prose: Haystack, hidden: Fact, depth: float, chat: bool
) -> tuple[str, str]:
    """Return the text up to the end of the prose, and the rest."""
    asked = f"\n\n{hidden.question}"
    content = prose.text(hidden.sentence, depth) + asked
    text = _rendered(tokenizer, content) if chat else f"{content}\n"
    cut = text.rindex(asked)
    return text[:cut], text[cut:] + hidden.lead


def _encode(tokenizer: PreTrainedTokenizerFast, text: str, chat: bool) -> list[int]:
    # A chat template writes special tokens such as <s> by itself.
    ids: list[int] = tokenizer.encode(text, add_special_tokens=not chat)
    return ids


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two sequences share at their beginning: a token may span the place of the cut."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
