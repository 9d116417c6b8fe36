"""Chat messages and tools, as a model's chat template takes them."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from spectrumkv.common.errors import InvalidArgumentError, quoted
from spectrumkv.v1 import prefill_pb2

ROLES = ("system", "user", "assistant", "tool")
MAX_TOOLS = 128
TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
# Levels of objects and lists in the schema of a tool, or in the arguments of a call.
MAX_JSON_LEVELS = 64
NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}

# For templates that say nothing of tools, in the words that Hermes and Qwen are trained on (Qwen2.5's chat template).
TOOLS_IN_SYSTEM = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""

Turn = dict[str, Any]


def check_roles(messages: Sequence[prefill_pb2.ChatMessage]) -> None:
    """Refuse messages of roles that there are not, and calls of others than assistants.

    Args:
        messages: of the conversation.

    Raises:
        InvalidArgumentError: a message has another role, or tool calls that it cannot have.
    """
    for place, message in enumerate(messages):
        if message.role not in ROLES:
            raise InvalidArgumentError(
                f"chat message {place} has the role {quoted(message.role)}; allowed: {', '.join(ROLES)}"
            )
        if message.tool_calls and message.role != "assistant":
            raise InvalidArgumentError(
                f"chat message {place} has tool calls and the role {quoted(message.role)}; only assistants call tools"
            )


def tool_parameters(chat: prefill_pb2.ChatMessages) -> dict[str, Mapping[str, Any]]:
    """Return the JSON schema of each tool's arguments, by the tool's name.

    Args:
        chat: the conversation with its tools.

    Returns:
        The schemas; none where the model is not to be shown the tools.

    Raises:
        InvalidArgumentError: there are too many tools, or one has no usable name or schema.
    """
    if len(chat.tools) > MAX_TOOLS:
        raise InvalidArgumentError(f"chat has {len(chat.tools)} tools; allowed: at most {MAX_TOOLS}")
    parameters: dict[str, Mapping[str, Any]] = {}
    for place, tool in enumerate(chat.tools):
        if not TOOL_NAME.fullmatch(tool.name):
            raise InvalidArgumentError(
                f"tool {place} has the name {quoted(tool.name)}; allowed: 1 to 64 letters, digits and _ . -"
            )
        if tool.name in parameters:
            raise InvalidArgumentError(f"two tools have the name {quoted(tool.name)}; give each its own")
        parameters[tool.name] = _object(f"the parameters of tool {quoted(tool.name)}", tool.parameters or None)
    return {} if chat.tool_choice == prefill_pb2.TOOL_CHOICE_NONE else parameters


def allowed_tools(chat: prefill_pb2.ChatMessages) -> dict[str, Mapping[str, Any]]:
    """Return the schemas of the tools of which a required call may call one.

    Args:
        chat: the conversation, whose tool choice is TOOL_CHOICE_REQUIRED.

    Returns:
        Like `tool_parameters`.

    Raises:
        InvalidArgumentError: there is none, or none of that name.
    """
    parameters = tool_parameters(chat)
    if chat.tool_name and chat.tool_name not in parameters:
        allowed = ", ".join(parameters) or "none, since there are no tools"
        raise InvalidArgumentError(f"tool_name is {quoted(chat.tool_name)}; allowed: {allowed}")
    if not parameters:
        raise InvalidArgumentError("tool_choice requires a call and there are no tools; give one at least")
    return {chat.tool_name: parameters[chat.tool_name]} if chat.tool_name else parameters


def template_tools(chat: prefill_pb2.ChatMessages) -> list[dict[str, Any]]:
    """Return the tools as chat templates take them.

    Args:
        chat: the conversation with its tools.
    """
    described = {tool.name: tool.description for tool in chat.tools}
    return [
        {"type": "function", "function": {"name": name, "description": described[name], "parameters": schema}}
        for name, schema in tool_parameters(chat).items()
    ]


def turns(messages: Sequence[prefill_pb2.ChatMessage], contents: Sequence[str]) -> list[Turn]:
    """Return messages as chat templates that know tools take them.

    Args:
        messages: of the conversation.
        contents: what takes the place of their contents.

    Raises:
        InvalidArgumentError: the arguments of a call are no JSON object.
    """
    found = []
    for message, content in zip(messages, contents, strict=True):
        turn: Turn = {"role": message.role, "content": content}
        if message.tool_calls:
            turn["tool_calls"] = [_call(call) for call in message.tool_calls]
        if message.role == "tool":
            turn |= {"tool_call_id": message.tool_call_id, "name": _name_of(message.tool_call_id, messages)}
        found.append(turn)
    return found


def turns_in_text(turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]]) -> list[Turn]:
    """Return messages in which tools, calls and results are text, for templates that know none of them.

    Args:
        turns: what `turns` returns.
        tools: what `template_tools` returns.
    """
    found: list[Turn] = []
    for turn in turns:
        content = turn["content"]
        for call in turn.get("tool_calls", ()):
            content += f"\n<tool_call>\n{_text(call['function'])}\n</tool_call>"
        if turn["role"] == "tool":
            found.append({"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"})
        else:
            found.append({"role": turn["role"], "content": content.removeprefix("\n")})
    if tools:
        described = TOOLS_IN_SYSTEM.format(tools="\n".join(map(_text, tools)))
        if found and found[0]["role"] == "system":
            found[0] = {"role": "system", "content": f"{found[0]['content']}\n\n{described}"}
        else:
            found.insert(0, {"role": "system", "content": described})
    return found


def _call(call: prefill_pb2.ToolCall) -> dict[str, Any]:
    arguments = _object(f"the arguments of the call of {quoted(call.name)}", call.arguments or "{}")
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _name_of(call_id: str, messages: Sequence[prefill_pb2.ChatMessage]) -> str:
    """Return the name of the function that a call named, which some templates show beside its result."""
    return next((call.name for message in messages for call in message.tool_calls if call.id == call_id), "")


def _object(what: str, text: str | None) -> Mapping[str, Any]:
    if text is None:
        return NO_ARGUMENTS
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"{what} are no JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidArgumentError(f"{what} are {quoted(text)}; allowed: a JSON object")
    # Beyond what Python's stack holds, whoever writes it out again would fail.
    if _has_more_levels(value, MAX_JSON_LEVELS):
        raise InvalidArgumentError(f"{what} have more than {MAX_JSON_LEVELS} levels of objects and lists; use fewer")
    try:
        _text(value).encode()
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(
            f"{what} have half of a character, {error.object[error.start]!r}; leave it out"
        ) from None
    return value


def _has_more_levels(value: Any, most: int) -> bool:
    """Return whether objects and lists lie in one another more than `most` deep."""
    level = [value]
    for _ in range(most + 1):
        containers = [one for one in level if isinstance(one, dict | list)]
        if not containers:
            return False
        level = [inner for one in containers for inner in (one.values() if isinstance(one, dict) else one)]
    return True


def _text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
