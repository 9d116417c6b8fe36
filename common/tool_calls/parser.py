"""Separates an answer, as it arrives, into text and tool calls."""

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from spectrumkv.common.tool_calls.call_reader import WHITESPACE, CallReader
from spectrumkv.common.tool_calls.formats import ToolCallFormat

# Between two calls, or around a list of them.
SEPARATORS = WHITESPACE + "[],;"


@dataclass(frozen=True)
class ContentDelta:
    """A piece of the answer's text outside calls."""

    text: str


@dataclass(frozen=True)
class CallDelta:
    """A piece of a call.

    Attributes:
        index: which call of the answer, from 0.
        id: of the call, in its first piece; empty in the others.
        name: of the function, likewise.
        arguments: the next piece of the arguments' JSON text; the pieces of a call put together are the arguments.
    """

    index: int
    id: str
    name: str
    arguments: str


Delta = ContentDelta | CallDelta


def new_call_id() -> str:
    """Return an id that no other call of a conversation has: nine letters and digits, as Mistral's templates want."""
    return secrets.token_hex(5)[:9]


class ToolCallParser:
    """Takes one answer's text piece by piece; the result does not depend on how it is cut.

    What looks like a call and is none comes back as text, whole.

    Args:
        call_format: how the model writes calls.
        call_id: makes the id of each call.

    Attributes:
        calls: how many calls have begun.
    """

    def __init__(self, call_format: ToolCallFormat, call_id: Callable[[], str] = new_call_id) -> None:
        self.calls = 0
        self._format = call_format
        self._call_id = call_id
        # Whether white space is held: at the start, where a call may follow it, and after a call.
        self._holds_space = bool(call_format.bare)
        self._among_calls = False
        # What came and is not decided yet: white space at the start, part of a mark, or a call without a name so far.
        self._held = ""
        self._reader: CallReader | None = None
        self._shown = False

    def push(self, text: str) -> list[Delta]:
        """Take the next piece of the answer's text.

        Args:
            text: the piece.

        Returns:
            What is certain with it, adjacent pieces of text or of a call's arguments put together.
        """
        return _merged(delta for character in text for delta in self._take(character))

    def finish(self) -> list[Delta]:
        """Return what was held back, once the answer has ended."""
        held, self._held = self._held, ""
        is_around_calls = self.calls > 0 and not held.strip(SEPARATORS)
        return [] if not held or self._shown or is_around_calls else [ContentDelta(held)]

    def _take(self, character: str) -> Iterator[Delta]:
        self._held += character
        if self._reader is not None:
            yield from self._take_in_call(self._reader, character)
        elif self._among_calls:
            yield from self._take_between_calls()
        else:
            yield from self._take_text()

    def _take_text(self) -> Iterator[Delta]:
        """Look for the mark before calls, or at the start for a call without it.

        Yields:
            Text that is certain to be outside calls.
        """
        marks = self._format
        stripped = self._held.lstrip(WHITESPACE)
        if self._holds_space and marks.begin != stripped and marks.begin.startswith(stripped):
            return
        if self._holds_space and marks.bare and stripped.startswith(marks.bare) and stripped != marks.begin:
            # The characters after a "[" that is not the mark's belong to the calls.
            self._holds_space, self._among_calls, self._held = False, True, ""
            for character in stripped:
                yield from self._take(character)
            return
        if self._held.endswith(marks.begin):
            before = "" if self._holds_space else self._held.removesuffix(marks.begin)
            self._holds_space, self._among_calls, self._held = False, True, marks.begin
            if before:
                yield ContentDelta(before)
            return
        self._holds_space = False
        certain = len(self._held) - _partial(self._held, marks.begin)
        text, self._held = self._held[:certain], self._held[certain:]
        if text:
            yield ContentDelta(text)

    def _take_between_calls(self) -> Iterator[Delta]:
        """Skip separators up to the next call, or to the mark after calls.

        Yields:
            What is neither, as text.
        """
        marks = self._format
        rest = self._held.removeprefix(marks.begin).lstrip(SEPARATORS)
        if not rest:
            return
        if rest == "{":
            self._reader, self._shown = CallReader(), False
            self._reader.push("{")
        elif marks.end and rest == marks.end and self.calls:
            self._among_calls, self._held, self._holds_space = False, "", True
        elif not (marks.end and marks.end.startswith(rest)):
            self._among_calls = False
            text, self._held = self._held, ""
            yield ContentDelta(text)

    def _take_in_call(self, reader: CallReader, character: str) -> Iterator[Delta]:
        reader.push(character)
        needs_arguments = not self._format.end
        if (
            reader.name is not None
            and not self._shown
            and (reader.has_arguments or (reader.is_complete and not needs_arguments))
        ):
            self._shown = True
            self.calls += 1
            yield CallDelta(self.calls - 1, self._call_id(), reader.name, "")
        if self._shown and (arguments := reader.take_arguments()):
            yield CallDelta(self.calls - 1, "", "", arguments)
        if not (reader.is_complete or reader.is_broken):
            return
        self._reader = None
        text, self._held = self._held, ""
        if not self._shown:
            self._among_calls = False
            yield ContentDelta(text)
        elif not reader.has_arguments:
            yield CallDelta(self.calls - 1, "", "", "{}")
        self._shown = False


def _partial(text: str, mark: str) -> int:
    """Return the length of the longest end of `text` that `mark` starts with."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if mark.startswith(text[-n:])), 0)


def _merged(deltas: Iterator[Delta]) -> list[Delta]:
    merged: list[Delta] = []
    for delta in deltas:
        last = merged[-1] if merged else None
        if isinstance(last, ContentDelta) and isinstance(delta, ContentDelta):
            merged[-1] = ContentDelta(last.text + delta.text)
        elif isinstance(last, CallDelta) and isinstance(delta, CallDelta) and last.index == delta.index:
            merged[-1] = CallDelta(last.index, last.id, last.name, last.arguments + delta.arguments)
        else:
            merged.append(delta)
    return merged
