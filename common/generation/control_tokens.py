"""Keeps control tokens in the content of chat messages from acting as such: `<|im_end|>` there is text.

The model's template writes control tokens between the messages, as text, and the tokenizer cannot tell those from
what a message says. Therefore a mark is put into every control token of the content before the template runs. The
stretches of the rendered text that have a marked control token are then tokenized, without the marks, by a tokenizer
that knows no control tokens. All other stretches get the tokens that they always get.

Control tokens are the tokenizer's special tokens, and those added tokens that the template writes, whether they are
called special or not. The latter may stand in an assistant's message: the model writes them itself, as `<think>`, and
templates look for them there. A template that itself changes a message's text (in lower case, say) can make a
control token of what was none before; against that there is no defence here.
"""

import json
import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from spectrumkv.common.errors import InvalidArgumentError

# Unicode's noncharacters, which no text should have: one that the messages lack is the mark.
MARKS = tuple(map(chr, range(0xFDD0, 0xFDF0)))
ASSISTANT = "assistant"


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
        first = bisect_right(self.marks, start)
        return first < len(self.marks) and self.marks[first] < end


class _Finder:
    """Finds where a content could bring control tokens.

    Args:
        tokens: the control tokens.
        normalizer: the tokenizer's; it may make a control token of a text that looks like one.
    """

    def __init__(self, tokens: Sequence[AddedToken], normalizer: Any) -> None:
        # Whatever is no control token is one unknown word for it.
        self._tokenizer = Tokenizer(WordLevel({"": 0}, unk_token=""))
        if normalizer is not None:
            self._tokenizer.normalizer = normalizer
        self._tokenizer.add_special_tokens(list(tokens))
        texts = [token.content for token in tokens]
        self._beginnings = {text[:length] for text in texts for length in range(1, len(text))}
        self._endings = {text[-length:] for text in texts for length in range(1, len(text))}
        self._longest = max(map(len, texts), default=0)

    def places(self, content: str) -> list[int]:
        """Return where marks belong in a content, in ascending order.

        There is one in each control token. One is at an edge of the content where what the template writes there,
        or the next message, could make a control token complete.
        """
        lengths = range(1, min(self._longest, len(content) + 1))
        inside = [start + 1 for token_id, start in self._words(content) if token_id]
        first = [0] if any(content[:length] in self._endings for length in lengths) else []
        last = [len(content)] if any(content[-length:] in self._beginnings for length in lengths) else []
        return [*first, *inside, *last]

    def _words(self, content: str) -> Iterator[tuple[int, int]]:
        """Yield id and first character of each control token, and of each stretch between them, whose id is 0."""
        encoded = self._tokenizer.encode(content, add_special_tokens=False)
        for token_id, (start, _) in zip(encoded.ids, encoded.offsets, strict=True):
            yield token_id, start


class ControlTokens:
    """Knows the control tokens of a tokenizer, and tokenizes text in which some of them are plain text.

    Args:
        tokenizer: the model's tokenizer, with its chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        backend = tokenizer.backend_tokenizer
        template = str(tokenizer.chat_template or "")
        added = {
            token_id: token for token_id, token in backend.get_added_tokens_decoder().items() if token.content.strip()
        }
        special = [token for token in added.values() if token.special]
        written = [token for token in added.values() if not token.special and token.content in template]
        names = {token.content for token in (*special, *written)}
        self._ids = frozenset(token_id for token_id, token in added.items() if token.content in names)
        self._finder = _Finder([*special, *written], backend.normalizer)
        self._assistants_finder = _Finder(special, backend.normalizer)
        self._lock = threading.Lock()
        self._plain: Tokenizer | None = None

    def mark(self, roles: Sequence[str], contents: Sequence[str]) -> tuple[str, list[str]] | None:
        """Mark the control tokens in messages.

        Args:
            roles: of the messages.
            contents: of the messages.

        Returns:
            The mark, one character, and the contents with it; None where there is nothing to mark.

        Raises:
            InvalidArgumentError: the contents have every character that could be a mark.
        """
        places = [
            (self._assistants_finder if role == ASSISTANT else self._finder).places(content)
            for role, content in zip(roles, contents, strict=True)
        ]
        if not any(places):
            return None
        mark = next((mark for mark in MARKS if not any(mark in content for content in contents)), None)
        if mark is None:
            raise InvalidArgumentError(
                "the messages have every noncharacter from U+FDD0 to U+FDEF; leave one of them out"
            )
        return mark, [_with_marks(content, here, mark) for content, here in zip(contents, places, strict=True)]

    def tokenize(self, marked: MarkedText) -> list[int]:
        """Tokenize a text whose marked control tokens are plain text, without special tokens around it.

        Args:
            marked: the text.

        Returns:
            The token ids.
        """
        encoded = self._tokenizer(marked.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = encoded.input_ids, encoded.offset_mapping
        places = [place for place, token_id in enumerate(ids) if token_id in self._ids]
        token_ids: list[int] = []
        first, start, forged = 0, 0, False
        for place in (*places, len(ids)):
            begin, end = offsets[place] if place < len(ids) else (len(marked.text), len(marked.text))
            if marked.marked_between(begin, end):
                forged = True
                continue
            token_ids += self._as_plain_text(marked.text[start:begin]) if forged else ids[first:place]
            token_ids += ids[place : place + 1]
            first, start, forged = place + 1, end, False
        return token_ids

    def _as_plain_text(self, text: str) -> list[int]:
        with self._lock:
            if self._plain is None:
                self._plain = self._without_control_tokens()
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return ids

    def _without_control_tokens(self) -> Tokenizer:
        # A tokenizer of its own: the settings are the tokenizer's, and other threads use it.
        state = json.loads(self._tokenizer.backend_tokenizer.to_str())
        for token in state["added_tokens"]:
            token["special"] = token["id"] in self._ids
        plain = Tokenizer.from_str(json.dumps(state))
        plain.no_truncation()
        plain.no_padding()
        plain.encode_special_tokens = True
        return plain


def _with_marks(content: str, places: Iterable[int], mark: str) -> str:
    ends = (*places, len(content))
    starts = (0, *ends)
    return mark.join(content[start:end] for start, end in zip(starts, ends, strict=False))
