"""Keeps control tokens in the content of chat messages from acting as such: `<|im_end|>` there is text.

The model's template writes control tokens between the messages, as text, and the tokenizer cannot tell those from
what a message says. Therefore a mark is put into every control token of the content before the template runs. The
stretches of the rendered text that have marks are then tokenized, without the marks, by a tokenizer that knows no
control tokens. All other stretches get the tokens that they always get.
"""

import copy
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from spectrumkv.common.errors import InvalidArgumentError

# Unicode's noncharacters, which no text should have: one that the messages lack is the mark.
MARKS = tuple(map(chr, range(0xFDD0, 0xFDF0)))


@dataclass(frozen=True)
class MarkedText:
    """Holds a text in which some control tokens are marked.

    Attributes:
        text: the text without the marks.
        marks: where the marks were: position of the character after each, in ascending order.
    """

    text: str
    marks: tuple[int, ...]

    @classmethod
    def parse(cls, text: str, mark: str) -> "MarkedText":
        """Take the marks out of a text.

        Args:
            text: the text.
            mark: one character.

        Returns:
            The text, and where it was marked.
        """
        stretches = text.split(mark)
        places, place = [], 0
        for stretch in stretches[:-1]:
            place += len(stretch)
            places.append(place)
        return cls("".join(stretches), tuple(places))

    def marked_between(self, start: int, end: int) -> bool:
        """Return whether a mark lies within the text from `start` to `end`."""
        return any(start < place < end for place in self.marks)


class ControlTokens:
    """Knows the control tokens of a tokenizer, and tokenizes text in which some of them are plain text.

    Args:
        tokenizer: the model's tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
        special = {token_id: token.content for token_id, token in added.items() if token.special}
        self._ids = frozenset(special)
        # Of two that begin at the same place the tokenizer takes the longer one.
        longest_first = sorted(filter(None, special.values()), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        self._lock = threading.Lock()
        self._plain: Tokenizer | None = None

    def choose_mark(self, contents: Sequence[str]) -> str | None:
        """Return a character that can mark control tokens in these texts; None where they have no control token.

        Raises:
            InvalidArgumentError: the texts have every character that could be a mark.
        """
        if self._pattern is None or not any(map(self._pattern.search, contents)):
            return None
        for mark in MARKS:
            if not any(mark in content for content in contents):
                return mark
        raise InvalidArgumentError(
            "the messages have every noncharacter from U+FDD0 to U+FDEF; leave one of them out"
        )

    def mark(self, content: str, mark: str) -> str:
        """Return a text with a mark after the first character of each control token."""
        assert self._pattern is not None
        return self._pattern.sub(lambda found: found[0][0] + mark + found[0][1:], content)

    def tokenize(self, marked: MarkedText) -> list[int]:
        """Tokenize a text whose marked control tokens are plain text, without special tokens around it.

        Args:
            marked: the text.

        Returns:
            The token ids.
        """
        encoded = self._tokenizer(marked.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = encoded.input_ids, encoded.offset_mapping
        acting = [
            place
            for place, token_id in enumerate(ids)
            if token_id in self._ids and not marked.marked_between(*offsets[place])
        ]
        token_ids: list[int] = []
        first, start = 0, 0
        for place in (*acting, len(ids)):
            end = offsets[place][0] if place < len(ids) else len(marked.text)
            # A mark at the edge of a stretch is in none of its tokens.
            if marked.marked_between(start, end):
                token_ids += self._as_plain_text(marked.text[start:end])
            else:
                token_ids += ids[first:place]
            if place < len(ids):
                token_ids.append(ids[place])
                first, start = place + 1, offsets[place][1]
        return token_ids

    def _as_plain_text(self, text: str) -> list[int]:
        with self._lock:
            if self._plain is None:
                # A copy: the setting is the tokenizer's, and other threads use it.
                self._plain = copy.deepcopy(self._tokenizer.backend_tokenizer)
                self._plain.no_truncation()
                self._plain.no_padding()
                self._plain.encode_special_tokens = True
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return ids
