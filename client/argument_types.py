"""Checks that arguments have the types that they are declared with, and says in a sentence what is allowed.

Why this is neither pydantic, beartype nor typeguard: docs/adr/0112-argument-checks.md.
"""

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args

from spectrumkv.common.errors import InvalidArgumentError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


# Beyond about nine times this, gRPC takes a deadline for one that has passed.
LONGEST_TIMEOUT_SECONDS = 1e9


@dataclass(frozen=True)
class _Kind:
    """The values that fit a declared type, and the words for them."""

    allowed: str
    fits: Callable[[Any], bool]


def check_type(name: str, value: object, declared: Any) -> None:
    """Check one argument.

    Args:
        name: the argument's name, for the error.
        value: the value that was passed.
        declared: the argument's type: a key of `_KINDS`, a class, a class or None, or a tuple of a class.

    Raises:
        InvalidArgumentError: the value has another type, or is a text that UTF-8 cannot encode.
    """
    kind = _KINDS.get(declared) or _kind_of_class(declared)
    if not kind.fits(value):
        raise InvalidArgumentError(f"{name} is {reprlib.repr(value)}; allowed: {kind.allowed}")
    if isinstance(value, str):
        _check_encodable(name, value)
    elif isinstance(value, Sequence):
        for text in value:
            if isinstance(text, str):
                _check_encodable(name, text)


def grpc_timeout(seconds: object) -> float | None:
    """Return a timeout as gRPC takes it.

    Args:
        seconds: the timeout that a caller passed; infinity is none.

    Returns:
        The seconds, or None for no timeout.

    Raises:
        InvalidArgumentError: the timeout is no number, not a number (NaN), not above 0, or finite and too long.
    """
    check_type("timeout", seconds, float)
    number = float(seconds)  # type: ignore[arg-type]  # checked above
    if number == math.inf:
        return None
    if not 0 < number <= LONGEST_TIMEOUT_SECONDS:
        raise InvalidArgumentError(
            f"timeout is {number:g}; allowed: seconds above 0, up to {LONGEST_TIMEOUT_SECONDS:g}, or infinity"
        )
    return number


def check_fields(arguments: "DataclassInstance", but: tuple[str, ...] = ()) -> None:
    """Check the fields of a dataclass as `check_type` does.

    Args:
        arguments: the dataclass.
        but: the names of fields that are not checked.

    Raises:
        InvalidArgumentError: a field has a value of another type, or a text that UTF-8 cannot encode.
    """
    for one in (one for one in fields(arguments) if one.name not in but):
        check_type(one.name, getattr(arguments, one.name), one.type)


def _check_encodable(name: str, text: str) -> None:
    """Refuse lone surrogates: Python reads bytes of a command line that are not UTF-8 as such.

    Raises:
        InvalidArgumentError: the text has a lone surrogate.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        culprit = text[error.start]
        raise InvalidArgumentError(
            f"{name} has {culprit!a} at character {error.start}, which is not valid text; give UTF-8"
        ) from error


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_whole(value: object) -> bool:
    # NumPy's numbers are allowed, too. True and False are not, although Python counts them as whole numbers.
    return isinstance(value, (int, Integral)) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (float, Real)) and not isinstance(value, bool)


def _is_switch(value: object) -> bool:
    return isinstance(value, bool)


def _or_none(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


def _each(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    # A text is a sequence of texts as well, but a caller who passes one means something else.
    return lambda value: isinstance(value, Sequence) and not isinstance(value, str | bytes) and all(map(fits, value))


def _is_logit_bias(value: object) -> bool:
    return isinstance(value, Mapping) and all(map(_is_whole, value)) and all(map(_is_number, value.values()))


def _kind_of_class(declared: Any) -> _Kind:
    if not get_args(declared):
        return _Kind(f"a {declared.__name__}", lambda one: isinstance(one, declared))
    named = get_args(declared)[0]
    if isinstance(declared, UnionType):
        return _Kind(f"a {named.__name__}, or None", lambda one: one is None or isinstance(one, named))
    return _Kind(f"a tuple of {named.__name__}", _each(lambda one: isinstance(one, named)))


_KINDS: dict[Any, _Kind] = {
    str: _Kind("a text", _is_text),
    str | None: _Kind("a text, or None for the server's default", _or_none(_is_text)),
    int | None: _Kind("a whole number, or None for the server's default", _or_none(_is_whole)),
    float: _Kind("a number", _is_number),
    float | None: _Kind("a number, or None for the server's default", _or_none(_is_number)),
    bool: _Kind("True or False", _is_switch),
    tuple[str, ...]: _Kind("texts, such as ('one', 'two')", _each(_is_text)),
    tuple[int, ...]: _Kind("token ids, such as (1, 2, 3)", _each(_is_whole)),
    Mapping[int, float]: _Kind("numbers by token id, such as {11: -100}", _is_logit_bias),
}
