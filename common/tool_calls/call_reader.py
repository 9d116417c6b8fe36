"""Reads one call, a JSON object with a name and arguments, character by character."""

import json
from enum import Enum, auto

WHITESPACE = " \n\r\t"
ARGUMENT_KEYS = ("arguments", "parameters")


class _State(Enum):
    KEY_OR_END = auto()
    KEY = auto()
    COLON = auto()
    VALUE = auto()
    AFTER_VALUE = auto()
    END = auto()


class CallReader:
    """Takes the characters of a JSON object, from its opening brace on.

    Attributes:
        name: the function's, once it is complete.
        has_arguments: whether the arguments have begun.
        is_complete: whether the object has ended.
        is_broken: whether what came is no JSON object with a name and arguments.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.has_arguments = False
        self.is_complete = False
        self.is_broken = False
        self._state: _State | None = None
        self._key = ""
        # The characters of the key or of the value that is being read; lists, since a call may be long.
        self._read: list[str] = []
        self._arguments: list[str] = []
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def push(self, character: str) -> None:
        """Take the next character; none may follow once the object is complete or broken."""
        if self._state is None:
            self._go_on(character == "{", _State.KEY_OR_END)
        elif self._state is _State.KEY:
            self._take_key(character)
        elif self._state is _State.VALUE:
            self._take_value(character)
        elif character not in WHITESPACE:
            self._take_mark(character)

    def take_arguments(self) -> str:
        """Return the text of the arguments that came since the last call, as JSON."""
        taken, self._arguments = self._arguments, []
        return "".join(taken)

    def _take_mark(self, character: str) -> None:
        if character == "}" and self._state in (_State.KEY_OR_END, _State.AFTER_VALUE):
            self._state, self.is_complete = _State.END, True
        elif self._state is _State.KEY_OR_END:
            self._read = [character]
            self._go_on(character == '"', _State.KEY)
        elif self._state is _State.COLON:
            self._read = []
            self._go_on(character == ":", _State.VALUE)
        else:
            self._go_on(character == ",", _State.KEY_OR_END)

    def _take_key(self, character: str) -> None:
        self._read.append(character)
        if self._ends_string(character):
            self._key = str(self._loaded())
            self._state = _State.COLON

    def _take_value(self, character: str) -> None:
        if not self._read and character in WHITESPACE:
            return
        if not self._read:
            self._in_string = character == '"'
            self._depth = int(character in "{[")
            self._begin_value(character)
            return
        is_scalar = self._depth == 0 and not self._in_string
        if is_scalar and character in ",}" + WHITESPACE:
            self._end_value()
            self.push(character)
            return
        self._add(character)
        if self._in_string:
            if self._ends_string(character):
                self._in_string = False
                if self._depth == 0:
                    self._end_value()
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            if self._depth == 0:
                self._end_value()

    def _begin_value(self, character: str) -> None:
        self.has_arguments |= self._key in ARGUMENT_KEYS
        self._add(character)

    def _add(self, character: str) -> None:
        self._read.append(character)
        # Arguments as a string of JSON are taken when they are complete.
        if self._key in ARGUMENT_KEYS and self._read[0] != '"':
            self._arguments.append(character)

    def _end_value(self) -> None:
        self._state = _State.AFTER_VALUE
        value = self._loaded()
        if self._key == "name":
            self.name = value if isinstance(value, str) else None
            self.is_broken |= self.name is None
        elif self._key in ARGUMENT_KEYS and isinstance(value, str):
            self._arguments.append(value)

    def _ends_string(self, character: str) -> bool:
        if self._escaped or character == "\\":
            self._escaped = not self._escaped
            return False
        return character == '"'

    def _loaded(self) -> object:
        """Return the key or the value that was read; None, and the object is broken, where it is no JSON."""
        try:
            return json.loads("".join(self._read))
        except (ValueError, RecursionError):
            self.is_broken = True
            return None

    def _go_on(self, expected: bool, state: _State) -> None:
        self._state = state
        self.is_broken |= not expected
