"""Declare the fields of a route: those that it supports, and those that it refuses or ignores, by name.

Supported fields are the fields of a pydantic model. `refused` and `ignored` of the model name the others that the
OpenAI API and vLLM have. `conformance` makes the table of docs/gateway.md out of all three.
"""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationInfo, model_validator
from pydantic.fields import FieldInfo

OPENAI, VLLM, SPECTRUMKV = "OpenAI", "vLLM", "SpectrumKV"

Text = Annotated[str, Strict()]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Whole = Annotated[int, Strict()]
Switch = Annotated[bool, Strict()]
# The first entry that is wrong ends the check: a body of 8 MiB has room for millions, each with an error of its own.
Entry = TypeVar("Entry")
Entries = Annotated[list[Entry], Field(fail_fast=True)]

# Messages, tools, calls and whatever else is an object with fields; each takes some 10 us to check.
MAX_OBJECTS = 16384


class FieldError(ValueError):
    """A field's value is not allowed; a validator raises it, and pydantic keeps it in the context of its own error.

    Args:
        message: a whole sentence.
        param: the field that is at fault; None is the one that is validated.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


@dataclass
class _ObjectsLeft:
    """Count the objects of a body down.

    Attributes:
        left: how many more there may be.
    """

    left: int = MAX_OBJECTS

    def take(self) -> None:
        """Count one.

        Raises:
            FieldError: there are too many.
        """
        if not self.left:
            raise FieldError(f"the body has more than {MAX_OBJECTS:,} messages, calls and tools; send fewer")
        self.left -= 1


@dataclass(frozen=True)
class Refused:
    """Describe a field that is known and not supported.

    Attributes:
        origin: whose field it is.
        reason: why, and what to do; the end of a sentence that begins with the field's name.
        neutral: the values besides null that ask for nothing, and are let through.
    """

    origin: str
    reason: str
    neutral: tuple[Any, ...] = ()

    def asks_for_nothing(self, value: object) -> bool:
        """Return whether a value is what the API takes where the field is left out."""
        return value is None or any(value == one and type(value) is type(one) for one in self.neutral)


@dataclass(frozen=True)
class Ignored:
    """Describe a field that says nothing about the answer.

    Attributes:
        origin: whose field it is.
        reason: what the field is for.
    """

    origin: str
    reason: str


def supported(origin: str, meaning: str, default: Any = None) -> Any:
    """Declare a supported field.

    Args:
        origin: whose field it is.
        meaning: what it does, for the table.
        default: its value where it is left out; `...` where it must be given.

    Returns:
        The pydantic field.
    """
    return Field(default, description=meaning, json_schema_extra={"origin": origin})


class RequestFields(BaseModel):
    """Hold the body of a request. A field that is unknown, or known and refused, is named in the error."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    refused: ClassVar[Mapping[str, Refused]] = {}
    ignored: ClassVar[Mapping[str, Ignored]] = {}

    @classmethod
    def read(cls, body: bytes) -> Self:
        """Return the fields of a body.

        Args:
            body: JSON in UTF-8.

        Raises:
            pydantic.ValidationError: it is no JSON object with these fields, or has too many objects.
        """
        return cls.model_validate_json(body, context=_ObjectsLeft())

    @classmethod
    def names(cls) -> dict[str, FieldInfo]:
        """Return the supported fields, under the names that requests have for them."""
        return {field.alias or name: field for name, field in cls.model_fields.items()}

    @model_validator(mode="before")
    @classmethod
    def _know_every_field(cls, body: object, info: ValidationInfo) -> object:
        if isinstance(info.context, _ObjectsLeft):
            info.context.take()
        if not isinstance(body, dict):
            return body
        names = cls.names()
        for name, value in body.items():
            if name in names or name in cls.ignored:
                continue
            known = cls.refused.get(name)
            if known is None:
                allowed = ", ".join(sorted(names))
                raise FieldError(f"{reprlib.repr(name)} is no field here; allowed: {allowed}", name[:80])
            if not known.asks_for_nothing(value):
                raise FieldError(f"{name} is {reprlib.repr(value)}; {known.reason}", name)
        return body
