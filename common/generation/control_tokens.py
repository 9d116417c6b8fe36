"""Keeps control tokens in the content of chat messages from acting as such: `<|im_end|>` there is text.

The model's template writes control tokens between the messages, as text, and the tokenizer cannot tell those from
what a message says. Therefore a mark is put into every control token of the content before the template runs. The
stretches of the rendered text that have a marked control token are then tokenized, without the marks, by a tokenizer
that knows no control tokens. All other stretches get the tokens that they always get.

Control tokens are the tokenizer's special tokens, and those added tokens that the template writes, whether they are
called special or not. The latter may stand in an assistant's message: the model writes them itself, as `<think>`, and
templates look for them there.

A template may change a message's text, and so make a control token of what was none before (in lower case, say), or
lose a mark. Therefore the template also renders harmless messages of the same shape: where other control tokens act
than there, the messages are refused.
"""

import json
import re
import string
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from spectrumkv.common.errors import InvalidArgumentError, quoted

# Unicode's noncharacters, which no text should have: two that the messages lack are the marks.
NONCHARACTERS = tuple(map(chr, range(0xFDD0, 0xFDF0)))
ASSISTANT = "assistant"
# Characters that a harmless message keeps, so that templates find what they look for ("/no_think", say): no control
# token is made of them, and no filter makes anything else of them.
KEPT = frozenset(string.ascii_letters + string.digits + string.whitespace + "/_-.,:!?'")


@dataclass(frozen=True)
class Marks:
    """Two characters that mark text: `inside` stands within a control token, `single` before one of one character."""

    inside: str
    single: str


@dataclass(frozen=True)
class MarkedText:
    """Holds a text in which some control tokens are marked.

    Attributes:
        text: the text without the marks.
        inside: where marks of that kind were: position of the character after each, in ascending order.
        single: the same of the other kind.
    """

    text: str
    inside: tuple[int, ...] = ()
    single: frozenset[int] = frozenset()

    @classmethod
    def parse(cls, text: str, marks: Marks) -> "MarkedText":
        """Take the marks out of a text.

        Args:
            text: the text.
            marks: what marks it.

        Returns:
            The text, and where it was marked.
        """
        stretches = re.split(f"([{marks.inside}{marks.single}])", text)
        inside, single, place = [], set(), 0
        for stretch, mark in zip(stretches[::2], [*stretches[1::2], ""], strict=True):
            place += len(stretch)
            if mark == marks.inside:
                inside.append(place)
            elif mark == marks.single:
                single.add(place)
        return cls("".join(stretches[::2]), tuple(inside), frozenset(single))

    def is_marked(self, start: int, end: int) -> bool:
        """Return whether the token from `start` to `end` is marked."""
        first = bisect_right(self.inside, start)
        within = first < len(self.inside) and self.inside[first] < end
        return within or (end - start == 1 and start in self.single)


class _Finder:
    """Finds where a content could bring control tokens.

    Args:
        tokens: the control tokens.
        normalizer: the tokenizer's; it may make a control token of a text that looks like one.
    """

    def __init__(self, tokens: Sequence[AddedToken], normalizer: Any) -> None:
        self._tokenizer = _only_added(tokens, normalizer)
        texts = [token.content for token in tokens]
        self._beginnings = {text[:length] for text in texts for length in range(1, len(text))}
        self._endings = {text[-length:] for text in texts for length in range(1, len(text))}
        self._longest = max(map(len, texts), default=0)

    def marked(self, content: str, marks: Marks) -> str:
        """Return a content with its marks; the same where there is nothing to mark.

        There is one in each control token. One is at an edge of the content where what the template writes there,
        or the next message, could make a control token complete; also where the template strips the content.
        """
        places = dict.fromkeys(self._edges(content), marks.inside)
        for token_id, (start, end) in self._words(content):
            if token_id:
                places |= {start: marks.single} if end - start == 1 else {start + 1: marks.inside}
        if not places:
            return content
        ordered = sorted(places)
        pieces = [content[start:end] for start, end in zip([0, *ordered], [*ordered, len(content)], strict=True)]
        return pieces[0] + "".join(places[place] + piece for place, piece in zip(ordered, pieces[1:], strict=True))

    def _edges(self, content: str) -> Iterator[int]:
        """Yield the edges of a content, and of the stripped content, where a control token could become complete."""
        text_start, text_end = len(content) - len(content.lstrip()), len(content.rstrip())
        lengths = range(1, min(self._longest, len(content) + 1))
        for start in {0, text_start}:
            if any(content[start : start + length] in self._endings for length in lengths):
                yield start
        for end in {len(content), text_end}:
            if any(content[max(end - length, 0) : end] in self._beginnings for length in lengths):
                yield end

    def _words(self, content: str) -> Iterator[tuple[int, tuple[int, int]]]:
        """Yield id and place of each control token, and of each stretch between them, whose id is 0."""
        encoded = self._tokenizer.encode(content, add_special_tokens=False)
        yield from zip(encoded.ids, encoded.offsets, strict=True)


class ControlTokens:
    """Knows the control tokens of a tokenizer, and tokenizes text in which some of them are plain text.

    Args:
        tokenizer: the model's tokenizer, with its chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        backend = tokenizer.backend_tokenizer
        template = str(tokenizer.chat_template or "")
        decoder = backend.get_added_tokens_decoder()
        added = {token_id: token for token_id, token in decoder.items() if token.content.strip()}
        special = {token_id: token for token_id, token in added.items() if token.special}
        written = {
            token_id: token for token_id, token in added.items() if not token.special and token.content in template
        }
        self._special_ids = frozenset(special) - {tokenizer.unk_token_id}
        self._ids = frozenset(special) | frozenset(written)
        self._names = frozenset(added[token_id].content for token_id in self._ids)
        self._finder = _Finder([*special.values(), *written.values()], backend.normalizer)
        self._assistants_finder = _Finder(list(special.values()), backend.normalizer)
        self._added = _only_added(list(decoder.values()), backend.normalizer)
        # What templates look for in an assistant's message stays there; the split gives it at odd places.
        names = sorted((token.content for token in written.values()), key=len, reverse=True)
        self._written = re.compile(f"({'|'.join(map(re.escape, names))})") if names else None
        wholly_kept = "".join(name for name in self._names if KEPT.issuperset(name))
        self._kept = KEPT - set(wholly_kept.lower() + wholly_kept.upper())
        self._lock = threading.Lock()
        self._plain: Tokenizer | None = None

    def mark(self, roles: Sequence[str], contents: Sequence[str]) -> tuple[Marks, list[str]]:
        """Mark the control tokens in messages.

        Args:
            roles: of the messages.
            contents: of the messages.

        Returns:
            The marks, and the contents with them.

        Raises:
            InvalidArgumentError: the contents have nearly every character that could be a mark.
        """
        unused = [mark for mark in NONCHARACTERS if not any(mark in content for content in contents)]
        if len(unused) < 2:
            raise InvalidArgumentError(
                "the messages have nearly every noncharacter from U+FDD0 to U+FDEF; leave two of them out"
            )
        marks = Marks(*unused[:2])
        finders = [self._assistants_finder if role == ASSISTANT else self._finder for role in roles]
        return marks, [finder.marked(content, marks) for finder, content in zip(finders, contents, strict=True)]

    def harmless(self, roles: Sequence[str], contents: Sequence[str]) -> list[str]:
        """Return contents of the same shape of which no template makes control tokens.

        Args:
            roles: of the messages.
            contents: of the messages.

        Returns:
            The contents, in which "x" is in place of every character that a control token could be made of. An
            assistant's messages keep the added tokens that are not special and that the template writes.
        """
        return [
            self._assistants_harmless(content) if role == ASSISTANT else self._without_unkept(content)
            for role, content in zip(roles, contents, strict=True)
        ]

    def acting(self, marked: MarkedText) -> list[str]:
        """Return the control tokens of a text that act, which are those without a mark, in their order."""
        encoded = self._added.encode(marked.text, add_special_tokens=False)
        return [
            token
            for token, (start, end) in zip(encoded.tokens, encoded.offsets, strict=True)
            if token in self._names and not marked.is_marked(start, end)
        ]

    def tokenize(self, marked: MarkedText) -> list[int]:
        """Tokenize a text whose marked control tokens are plain text, without special tokens around it.

        Args:
            marked: the text.

        Returns:
            The token ids.

        Raises:
            InvalidArgumentError: a marked control token has one character, and no other tokens stand for it.
        """
        encoded = self._tokenizer(marked.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = encoded.input_ids, encoded.offset_mapping
        places = [place for place, token_id in enumerate(ids) if token_id in self._ids]
        token_ids: list[int] = []
        first, start, forged = 0, 0, False
        for place in (*places, len(ids)):
            begin, end = offsets[place] if place < len(ids) else (len(marked.text), len(marked.text))
            if marked.is_marked(begin, end):
                forged = True
                continue
            token_ids += self._as_plain_text(marked.text[start:begin]) if forged else ids[first:place]
            token_ids += ids[place : place + 1]
            first, start, forged = place + 1, end, False
        return token_ids

    def _assistants_harmless(self, content: str) -> str:
        pieces = self._written.split(content) if self._written else [content]
        return "".join(piece if place % 2 else self._without_unkept(piece) for place, piece in enumerate(pieces))

    def _without_unkept(self, content: str) -> str:
        return "".join(character if character in self._kept else "x" for character in content)

    def _as_plain_text(self, text: str) -> list[int]:
        with self._lock:
            if self._plain is None:
                self._plain = self._without_control_tokens()
        encoded = self._plain.encode(text, add_special_tokens=False)
        # The vocabulary of some models has control tokens among its words: cut through these.
        found = [
            where
            for token_id, where in zip(encoded.ids, encoded.offsets, strict=True)
            if token_id in self._special_ids
        ]
        if not found:
            ids: list[int] = encoded.ids
            return ids
        if any(end - start < 2 for start, end in found):
            start, end = next((start, end) for start, end in found if end - start < 2)
            raise InvalidArgumentError(
                f"a message has {quoted(text[start:end])}, which this model reads as a control token; leave it out"
            )
        cuts = [start + 1 for start, _ in found]
        pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        return [token_id for piece in pieces for token_id in self._as_plain_text(piece)]

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


def _only_added(tokens: Sequence[AddedToken], normalizer: Any) -> Tokenizer:
    """Return a tokenizer that knows these tokens, for which whatever lies between them is one word with the id 0."""
    tokenizer = Tokenizer(WordLevel({"": 0}, unk_token=""))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens(list(tokens))
    return tokenizer
