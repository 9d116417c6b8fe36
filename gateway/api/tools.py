"""Read tools, the choice among them, and the calls that a conversation has."""

import json
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from spectrumkv.client.tools import TOOL_CHOICES, Tool, ToolCall, Tools
from spectrumkv.gateway.api.fields import OPENAI, FieldError, RequestFields, Switch, Text, supported


class FunctionFields(RequestFields):
    """Hold `function` of a tool."""

    name: Text = supported(OPENAI, "1 to 64 letters, digits and `_ . -`; each tool has its own", ...)
    description: Text | None = supported(OPENAI, "what the function does, for the model")
    parameters: dict[str, Any] | None = supported(OPENAI, "JSON schema of the arguments. Left out: there are none")
    strict: Switch | None = supported(
        OPENAI,
        "`true` only with `tool_choice` `required` or a function's name: the arguments of such calls hold to the "
        "schema in any case, those of other calls in none",
    )


class ToolFields(RequestFields):
    """Hold one of `tools`."""

    type: Literal["function"] = supported(OPENAI, "`function`", ...)
    function: FunctionFields = supported(OPENAI, "what may be called", ...)

    def tool(self) -> Tool:
        """Return what the client sends."""
        schema = "" if self.function.parameters is None else json.dumps(self.function.parameters)
        return Tool(self.function.name, self.function.description or "", schema)


class CalledFunctionFields(RequestFields):
    """Hold `function` of a call."""

    name: Text = supported(OPENAI, "of the function that was called", ...)
    arguments: Text = supported(OPENAI, "a JSON object, as a text", ...)


class ToolCallFields(RequestFields):
    """Hold one of the `tool_calls` of an assistant's message."""

    id: Text = supported(OPENAI, "which the message with the result names as `tool_call_id`", ...)
    type: Literal["function"] = supported(OPENAI, "`function`", ...)
    function: CalledFunctionFields = supported(OPENAI, "what was called", ...)

    def call(self) -> ToolCall:
        """Return what the client sends."""
        return ToolCall(self.id, self.function.name, self.function.arguments)


@dataclass(frozen=True)
class NamedFunction:
    """Hold the choice of one function, which must be called."""

    name: str


def _read_choice(value: object) -> object:
    """Return "none", "auto" or "required" as it is, and an object that names a function as that name.

    Raises:
        FieldError: the value is something else.
    """
    if value is None or (isinstance(value, str) and value in TOOL_CHOICES):
        return value
    if isinstance(value, dict) and value.keys() == {"type", "function"} and value["type"] == "function":
        function = value["function"]
        if isinstance(function, dict) and function.keys() == {"name"} and isinstance(function["name"], str):
            return NamedFunction(function["name"])
    allowed = ", ".join(f'"{one}"' for one in sorted(TOOL_CHOICES))
    raise FieldError(
        f"tool_choice is {reprlib.repr(value)}; allowed: {allowed}, "
        '{"type": "function", "function": {"name": "the name of a tool"}}'
    )


# A text is one of `TOOL_CHOICES`.
ToolChoice = Annotated[str | NamedFunction | None, BeforeValidator(_read_choice)]


def read_tools(tools: Sequence[ToolFields] | None, choice: str | NamedFunction | None) -> Tools:
    """Return which functions the model may call, and whether it does.

    Args:
        tools: of the request.
        choice: among them; None is "auto".

    Raises:
        FieldError: a call is wanted and there are no tools, or a schema is to hold that does not.
    """
    wants_call = choice not in (None, "auto", "none")
    if wants_call and not tools:
        raise FieldError("tool_choice wants a call and there are no tools; give some", "tool_choice")
    for place, one in enumerate(tools or ()):
        if one.function.strict and not wants_call:
            raise FieldError(
                'strict is True and tool_choice leaves it to the model; set tool_choice to "required", or leave '
                "strict out",
                f"tools.{place}.function.strict",
            )
    described = tuple(one.tool() for one in tools or ())
    if isinstance(choice, NamedFunction):
        return Tools(described, "required", choice.name)
    return Tools(described, choice or "auto")
