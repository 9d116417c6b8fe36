"""Separates an answer, as it arrives, into text and tool calls."""

import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby

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
        # Characters that came and are not decided yet: white space at the start, part of a mark, or a call without a
        # name so far. `_rest` is what they are without the white space or the separators before.
        self._held: list[str] = []
        self._rest = ""
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
        """Return what was held back, once the answer has ended; a cut-off mark after a call is no text."""
        held = self._release()
        rest = held.strip(SEPARATORS)
        is_part_of_end = self._among_calls and self._reader is None and self._format.end.startswith(rest)
        is_around_calls = self.calls > 0 and (not rest or is_part_of_end)
        return [] if not held or is_around_calls else [ContentDelta(held)]

    def _release(self) -> str:
        """Return what is held, and hold it no longer."""
        held = "".join(self._held)
        self._held, self._rest = [], ""
        return held

    def _take(self, character: str) -> Iterator[Delta]:
        if not self._shown:
            self._held.append(character)
        if self._reader is not None:
            yield from self._take_in_call(self._reader, character)
        elif self._among_calls:
            yield from self._take_between_calls(character)
        elif self._holds_space:
            yield from self._take_at_start(character)
        else:
            yield from self._take_text()

    def _take_at_start(self, character: str) -> Iterator[Delta]:
        """Skip white space up to a call or the mark before calls.

        Yields:
            What is neither, as text.
        """
        if self._rest or character not in WHITESPACE:
            self._rest += character
        marks, rest = self._format, self._rest
        if rest != marks.begin and marks.begin.startswith(rest):
            return
        self._holds_space = False
        if rest != marks.begin and marks.bare and rest.startswith(marks.bare):
            # The characters after a "[" that is not the mark's belong to the calls.
            self._among_calls = True
            self._release()
            for one in rest:
                yield from self._take(one)
        elif rest == marks.begin:
            self._begin_calls()
        else:
            yield from self._take_text()

    def _take_text(self) -> Iterator[Delta]:
        """Look for the mark before calls.

        Yields:
            Text that is certain to be outside calls.
        """
        begin, held = self._format.begin, self._release()
        if held.endswith(begin):
            text = held.removesuffix(begin)
            self._begin_calls()
        else:
            certain = len(held) - _partial(held, begin)
            text, self._held = held[:certain], list(held[certain:])
        if text:
            yield ContentDelta(text)

    def _begin_calls(self) -> None:
        """Go on behind the mark before calls, which is text after all where no call follows it."""
        self._among_calls, self._held, self._rest = True, list(self._format.begin), ""

    def _take_between_calls(self, character: str) -> Iterator[Delta]:
        """Skip separators up to the next call, or to the mark after calls.

        Yields:
            What is neither, as text.
        """
        if self._rest or character not in SEPARATORS:
            self._rest += character
        marks, rest = self._format, self._rest
        if not rest:
            return
        if rest == "{":
            self._reader = CallReader()
            self._reader.push("{")
        elif marks.end and rest == marks.end and self.calls:
            self._among_calls, self._holds_space = False, True
            self._release()
        elif not (marks.end and marks.end.startswith(rest)):
            self._among_calls = False
            yield ContentDelta(self._release())

    def _take_in_call(self, reader: CallReader, character: str) -> Iterator[Delta]:
        """Take in a call: its name once arguments follow, then these as they come.

        Yields:
            Pieces of the call; the whole as text where it is none.
        """
        reader.push(character)
        needs_arguments = not self._format.end
        is_call = reader.has_arguments or (reader.is_complete and not needs_arguments)
        if reader.name is not None and is_call and not self._shown:
            self._shown = True
            self._release()
            self.calls += 1
            yield CallDelta(self.calls - 1, self._call_id(), reader.name, "")
        if self._shown and (arguments := reader.take_arguments()):
            yield CallDelta(self.calls - 1, "", "", arguments)
        if reader.is_complete or reader.is_broken:
            yield from self._end_call(reader)

    def _end_call(self, reader: CallReader) -> Iterator[Delta]:
        """Go on behind a call, or behind what looked like one.

        Yields:
            Empty arguments where the call has none; the whole as text where it is no call.
        """
        self._reader = None
        if not self._shown:
            self._among_calls = False
            yield ContentDelta(self._release())
        elif not reader.has_arguments:
            yield CallDelta(self.calls - 1, "", "", "{}")
        self._shown, self._rest = False, ""


def _partial(text: str, mark: str) -> int:
    """Return the length of the longest end of `text` that `mark` starts with."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if mark.startswith(text[-n:])), 0)


def _merged(deltas: Iterable[Delta]) -> list[Delta]:
    """Return deltas with adjacent pieces of text, and of one call, put together."""
    merged: list[Delta] = []
    for _, run in groupby(deltas, lambda delta: delta.index if isinstance(delta, CallDelta) else None):
        pieces = list(run)
        if isinstance(pieces[0], CallDelta):
            arguments = "".join(one.arguments for one in pieces if isinstance(one, CallDelta))
            merged.append(replace(pieces[0], arguments=arguments))
        else:
            merged.append(ContentDelta("".join(one.text for one in pieces if isinstance(one, ContentDelta))))
    return merged
