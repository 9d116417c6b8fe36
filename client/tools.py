"""Describe the functions that a model may call, and the calls that a conversation has."""

from dataclasses import dataclass

from spectrumkv.client.argument_types import check_fields
from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.v1 import prefill_pb2

TOOL_CHOICES = {
    "auto": prefill_pb2.TOOL_CHOICE_AUTO,
    "none": prefill_pb2.TOOL_CHOICE_NONE,
    "required": prefill_pb2.TOOL_CHOICE_REQUIRED,
}


@dataclass(frozen=True)
class Tool:
    """Describe a function that the model may call.

    Args:
        name: of the function.
        description: what it does, for the model.
        parameters: JSON schema of its arguments, as JSON text; empty is a function without arguments.

    Raises:
        InvalidArgumentError: a value is no text. The server checks the schema.
    """

    name: str
    description: str = ""
    parameters: str = ""

    def __post_init__(self) -> None:
        check_fields(self)

    def to_proto(self) -> prefill_pb2.Tool:
        """Return the protobuf message."""
        return prefill_pb2.Tool(name=self.name, description=self.description, parameters=self.parameters)


@dataclass(frozen=True)
class ToolCall:
    """Hold one call of a function, as an assistant's message has it.

    Args:
        id: identifies the call; a tool's message names it as its `tool_call_id`.
        name: of the function.
        arguments: a JSON object, as JSON text.

    Raises:
        InvalidArgumentError: a value is no text.
    """

    id: str
    name: str
    arguments: str

    def __post_init__(self) -> None:
        check_fields(self)

    def to_proto(self) -> prefill_pb2.ToolCall:
        """Return the protobuf message."""
        return prefill_pb2.ToolCall(id=self.id, name=self.name, arguments=self.arguments)


@dataclass(frozen=True)
class Tools:
    """Say which functions the model may call in its answer to a conversation, and whether it does.

    Args:
        tools: the functions.
        choice: "auto" (the model decides), "none" (it is not shown the tools) or "required" (it calls one or more).
        name: with "required", the only tool that may be called; None is any.

    Raises:
        InvalidArgumentError: the choice is another, or a value has another type.
    """

    tools: tuple[Tool, ...] = ()
    choice: str = "auto"
    name: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.choice not in TOOL_CHOICES:
            raise InvalidArgumentError(f"choice is {self.choice!r}; allowed: {', '.join(TOOL_CHOICES)}")
        if self.name is not None and self.choice != "required":
            raise InvalidArgumentError(f"a tool's name, {self.name!r}, needs the choice 'required'")

    @property
    def may_be_called(self) -> bool:
        """Whether answers may have calls."""
        return bool(self.tools) and self.choice != "none"

    def put_into(self, chat: prefill_pb2.ChatMessages) -> None:
        """Set the fields of a conversation's protobuf message; without tools they stay unset."""
        if self.tools:
            chat.tools.extend(tool.to_proto() for tool in self.tools)
            chat.tool_choice = TOOL_CHOICES[self.choice]
            chat.tool_name = self.name or ""
