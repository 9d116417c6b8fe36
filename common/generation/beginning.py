"""Begins texts as their model expects: tokenizers such as Gemma's and Llama 3's put a token of its own before a text.

A model that was trained so predicts badly without that token, and draws its attention sink from it. Stretches cut out
of a long text therefore begin with it, too, wherever calibration, the probe and benches read them.
"""

from collections.abc import Sequence
from typing import Protocol


class TextTokenizer(Protocol):
    """Describes what is needed of a tokenizer; benches bring one of another release of transformers."""

    bos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool = ..., verbose: bool = ...) -> list[int]:
        """Turn text into tokens."""
        ...


def beginning_token(tokenizer: TextTokenizer) -> int | None:
    """Return the beginning-of-sequence token if the tokenizer puts one before a text, else None.

    Args:
        tokenizer: the model's.
    """
    first = tokenizer.encode("a", add_special_tokens=True)[0]
    return first if first == tokenizer.bos_token_id else None


def begun(token_ids: Sequence[int], beginning: int | None) -> list[int]:
    """Return a stretch of a text as a text of its own, in as many tokens.

    Args:
        token_ids: of the stretch, at least one.
        beginning: see `beginning_token`; it takes the place of the first token.
    """
    return list(token_ids) if beginning is None else [beginning, *token_ids[1:]]
