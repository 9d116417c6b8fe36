"""Whether arguments are of the types that they are declared with, and a sentence where they are not."""

import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from spectrumkv.common.errors import InvalidArgumentError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True)
class _Kind:
    """What fits a declared type, and how a sentence says it."""

    allowed: str
    fits: Callable[[Any], bool]


def check_type(name: str, value: object, declared: Any) -> None:
    """Check one argument.

    Args:
        name: of the argument, for the error.
        value: what was passed.
        declared: its type: one of those of `_KINDS`, or a class.

    Raises:
        InvalidArgumentError: the value is of another type, or a text that UTF-8 cannot carry.
    """
    kind = _KINDS.get(declared) or _Kind(f"a {declared.__name__}", lambda one: isinstance(one, declared))
    if not kind.fits(value):
        raise InvalidArgumentError(f"{name} is {reprlib.repr(value)}; allowed: {kind.allowed}")
    if isinstance(value, str):
        _check_encodable(name, value)
    elif isinstance(value, Sequence):
        for text in value:
            if isinstance(text, str):
                _check_encodable(name, text)


def check_fields(arguments: "DataclassInstance", but: tuple[str, ...] = ()) -> None:
    """Check the fields of a dataclass, those named in `but` apart, as `check_type` does."""
    for one in (one for one in fields(arguments) if one.name not in but):
        check_type(one.name, getattr(arguments, one.name), one.type)


def _check_encodable(name: str, text: str) -> None:
    """Refuse lone surrogates: Python reads bytes of a command line that are no UTF-8 as such."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        culprit = text[error.start]
        raise InvalidArgumentError(
            f"{name} has {culprit!a} at character {error.start}, which is no text; give valid UTF-8"
        ) from error


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_whole(value: object) -> bool:
    # The numbers of NumPy count too. True and False are whole numbers to Python only.
    return isinstance(value, (int, Integral)) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (float, Real)) and not isinstance(value, bool)


def _is_switch(value: object) -> bool:
    return isinstance(value, bool)


def _or_none(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


def _each(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    # A text is a sequence of texts, and yet hardly meant as one.
    return lambda value: isinstance(value, Sequence) and not isinstance(value, str | bytes) and all(map(fits, value))


_KINDS: dict[Any, _Kind] = {
    str: _Kind("a text", _is_text),
    str | None: _Kind("a text, or None for the server's default", _or_none(_is_text)),
    int | None: _Kind("a whole number, or None for the server's default", _or_none(_is_whole)),
    float: _Kind("a number", _is_number),
    float | None: _Kind("a number, or None for the server's default", _or_none(_is_number)),
    bool: _Kind("True or False", _is_switch),
    tuple[str, ...]: _Kind("texts, such as ('one', 'two')", _each(_is_text)),
    tuple[int, ...]: _Kind("token ids, such as (1, 2, 3)", _each(_is_whole)),
}
