"""Says what a field of a JSON file may hold, and of a field that holds something else what it should.

A rule is made from parts, as in `either(whole_number(0, 9), NULL)`. Rules for the fields that a library declares
follow from the types that it declares.
"""

import json
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, is_typeddict

# A value that a sentence shows is cut: some are whole vocabularies.
_LONGEST_VALUE = 60
# A float32 holds no more.
_LARGEST = 1e38


@dataclass(frozen=True)
class Allowed:
    """What a field may hold.

    Attributes:
        words: as a sentence says it, after "it must be".
        fits: whether a value is that.
    """

    words: str
    fits: Callable[[Any], bool]


TEXT = Allowed("a text", lambda value: isinstance(value, str))
TRUTH = Allowed("true or false", lambda value: isinstance(value, bool))
OBJECT = Allowed("an object in braces", lambda value: isinstance(value, dict))
NUMBER = Allowed("a number", lambda value: _is_number(value) and abs(value) < _LARGEST)
POSITIVE = Allowed("a number above 0", lambda value: NUMBER.fits(value) and value > 0)
NOT_NEGATIVE = Allowed("a number of at least 0", lambda value: NUMBER.fits(value) and value >= 0)
NULL = Allowed("null", lambda value: value is None)
_ANYTHING = Allowed("anything", lambda value: True)
_BY_TYPE: dict[Any, Allowed] = {
    str: TEXT,
    bool: TRUTH,
    int: Allowed("a whole number", lambda value: type(value) is int),
    float: NUMBER,
    dict: OBJECT,
    list: Allowed("a list", lambda value: isinstance(value, list)),
    type(None): NULL,
}


def whole_number(least: int, most: int) -> Allowed:
    """Allow the whole numbers between two.

    Args:
        least: the first that is allowed.
        most: the last.

    Returns:
        The allowance.
    """
    return Allowed(
        f"a whole number from {least} to {most}", lambda value: type(value) is int and least <= value <= most
    )


def one_of(*texts: str) -> Allowed:
    """Allow some texts.

    Args:
        texts: those.

    Returns:
        The allowance.
    """
    return Allowed(f"one of {', '.join(texts)}", lambda value: isinstance(value, str) and value in texts)


def list_of(entry: Allowed) -> Allowed:
    """Allow a list of any length.

    Args:
        entry: what each of its entries may be.

    Returns:
        The allowance.
    """
    return Allowed(
        f"a list (each entry {entry.words})", lambda value: isinstance(value, list) and all(map(entry.fits, value))
    )


def either(*those: Allowed) -> Allowed:
    """Allow what at least one of several allows.

    Args:
        those: the several.

    Returns:
        The allowance.
    """
    return Allowed(" or ".join(one.words for one in those), lambda value: any(one.fits(value) for one in those))


def of_type(declared: Any) -> Allowed:
    """Allow what a library declares for a field.

    Args:
        declared: a type or a union of types; where one of them is none that JSON has, anything is allowed.

    Returns:
        The allowance. A whole number stands for a fraction, as it does in JSON.
    """
    origin, parts = get_origin(declared), get_args(declared)
    if origin in (Union, types.UnionType):
        rules = [of_type(part) for part in parts if not (part is int and float in parts)]
        return _ANYTHING if _ANYTHING in rules else either(*rules)
    if origin is Literal:
        return one_of(*map(str, parts))
    if origin is list and parts:
        return list_of(of_type(parts[0]))
    if is_typeddict(declared):
        return OBJECT
    return _BY_TYPE.get(origin or declared, _ANYTHING)


def misfits(given: Mapping[str, Any], rules: Mapping[str, Allowed], of: str = "") -> Iterator[str]:
    """Yield a sentence for each field that holds what it may not.

    Args:
        given: a JSON object; a field that it lacks is none.
        rules: what each field may hold, by name.
        of: the end of the name that a sentence gives a field, such as " of the rotary embedding".

    Yields:
        The field's name, its value, shortened, and what it must be.
    """
    for name, allowed in rules.items():
        if name in given and not allowed.fits(given[name]):
            yield f"{name}{of} is {shown(given[name])}, and it must be {allowed.words}"


def shown(value: object) -> str:
    """Return a value of a JSON file as a sentence shows it: its beginning where it is long.

    Args:
        value: what `json.loads` made of it.
    """
    text = json.dumps(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
