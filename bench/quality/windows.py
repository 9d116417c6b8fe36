"""A text, cut into windows of context and scored tokens that share no target."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from spectrumkv.common.errors import InvalidArgumentError


class Tokenizer(Protocol):
    """What is needed of a tokenizer."""

    bos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool = ..., verbose: bool = ...) -> list[int]:
        """Turn text into tokens."""
        ...


@dataclass(frozen=True)
class Window:
    """A piece of text, as it is served.

    Attributes:
        index: from 0 at the start of the text.
        context: the prompt.
        following: tokens that are read over the received KV, one after another.
        targets: what each of them is to predict: the token after it.

    The first of `following` is what follows the prompt. Prefill, which has exact KV, would have to predict it, so
    nobody is measured by it.
    """

    index: int
    context: tuple[int, ...]
    following: tuple[int, ...]
    targets: tuple[int, ...]


def read_text(path: Path) -> str:
    """Read a text.

    Raises:
        InvalidArgumentError: there is none, or it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidArgumentError(f"--text {path}: {error.strerror}; name a file of UTF-8 text") from error
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(f"--text {path} is not UTF-8: {error}") from error


def text_digest(text: str) -> str:
    """SHA-256 of the text in UTF-8, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def cut(tokenizer: Tokenizer, text: str, context: int, scored: int, skip: int, count: int) -> list[Window]:
    """Cut a text into windows of `context` + `scored` tokens, one after another.

    A window's last target is the first token of the next one's context. Where the tokenizer puts a
    beginning-of-sequence token before a text, it takes the place of the first token of every context.

    Args:
        tokenizer: the model's.
        text: all of it.
        context: tokens of each prompt.
        scored: tokens scored in each window.
        skip: windows at the text's start that are left out.
        count: how many windows to return; 0 is all that there are.

    Raises:
        InvalidArgumentError: a number is out of its range, or the text has no such windows.
    """
    for name, value, least in (("context", context, 2), ("scored", scored, 1), ("skip-windows", skip, 0)):
        if value < least:
            raise InvalidArgumentError(f"--{name} is {value}; it must be at least {least}")
    if count < 0:
        raise InvalidArgumentError(f"--windows is {count}; it must be at least 1, or 0 for all")
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    available = max(0, (len(ids) - 1) // (context + scored))
    wanted = count or available - skip
    if wanted < 1 or skip + wanted > available:
        raise InvalidArgumentError(
            f"the text has {len(ids)} tokens, that is {available} windows of {context} + {scored}; "
            f"--skip-windows {skip} --windows {count} asks for others"
        )
    begin = _begins_with(tokenizer)
    return [_window(ids, index, context, scored, begin) for index in range(skip, skip + wanted)]


def _begins_with(tokenizer: Tokenizer) -> int | None:
    """The beginning-of-sequence token, where the tokenizer puts one before a text."""
    first = tokenizer.encode("a", add_special_tokens=True)[0]
    return first if first == tokenizer.bos_token_id else None


def _window(ids: Sequence[int], index: int, context: int, scored: int, begin: int | None) -> Window:
    start = index * (context + scored)
    middle, end = start + context, start + context + scored
    prompt = ids[start:middle] if begin is None else [begin, *ids[start + 1 : middle]]
    return Window(index, tuple(prompt), tuple(ids[middle:end]), tuple(ids[middle + 1 : end + 1]))
