"""The form of an answer that calls tools, in the way in which the model writes calls."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

from spectrumkv.common.errors import InvalidArgumentError, quoted
from spectrumkv.common.generation.structured.form import StructuredOutput
from spectrumkv.common.generation.structured.grammar import JSON_OPTIONS
from spectrumkv.common.tool_calls.formats import ToolCallFormat

# Where a JSON schema keeps what its references name.
DEFINITIONS = ("$defs", "definitions")


def required_calls(
    parameters: Mapping[str, Mapping[str, Any]], call_format: ToolCallFormat, tokenizer: PreTrainedTokenizerFast
) -> StructuredOutput:
    """Return the form of an answer that is one call or more, whose arguments are those of the tools.

    Args:
        parameters: JSON schema of each tool's arguments, by the tool's name.
        call_format: how the model writes calls.
        tokenizer: the model's; a mark that is a special token of it is generated as that token.

    Returns:
        A grammar.

    Raises:
        InvalidArgumentError: two tools give different definitions the same name, or definitions have no names.
    """
    schema, definitions = _call_schema(parameters, call_format)
    begin, end = _mark(call_format.begin, tokenizer), _mark(call_format.end, tokenizer)
    if call_format.end:
        start = f'start: call ("\\n" call)*\ncall: {begin} "\\n" calls "\\n" {end}'
    elif call_format.bare == "[":
        start = f"start: {begin} calls"
        schema = {"type": "array", "items": schema, "minItems": 1}
    else:
        start = "start: calls"
    calls = "calls: %json " + json.dumps(_whole(schema, definitions))
    return StructuredOutput("grammar", f"%llguidance {{}}\n{start}\n{calls}")


def _call_schema(
    parameters: Mapping[str, Mapping[str, Any]], call_format: ToolCallFormat
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return the schema of one call, and the definitions of all tools: references are looked up from the root.

    Raises:
        InvalidArgumentError: two tools give different definitions the same name, or definitions have no names.
    """
    definitions: dict[str, dict[str, Any]] = {key: {} for key in DEFINITIONS}
    calls: list[dict[str, Any]] = []
    for name, schema in parameters.items():
        for key, known in definitions.items():
            _define(known, schema.get(key, {}), key, name)
        arguments = {key: value for key, value in schema.items() if key not in DEFINITIONS}
        properties = {"name": {"const": name}, call_format.arguments: arguments}
        calls.append(
            {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
        )
    return ({"anyOf": calls} if len(calls) > 1 else calls[0]), definitions


def _define(known: dict[str, Any], definitions: object, key: str, tool: str) -> None:
    """Add a tool's definitions to those of the other tools.

    Raises:
        InvalidArgumentError: another tool gives one of the names to something else, or the definitions have no names.
    """
    if not isinstance(definitions, Mapping):
        raise InvalidArgumentError(f"{key} of tool {quoted(tool)} is {quoted(str(definitions))}; allowed: an object")
    for title, definition in definitions.items():
        if known.setdefault(title, definition) != definition:
            raise InvalidArgumentError(
                f"two tools have different definitions named {quoted(title)} in {key}; rename one of them"
            )


def _whole(schema: Mapping[str, Any], definitions: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    used: Sequence[str] = [key for key in DEFINITIONS if definitions.get(key)]
    return {"x-guidance": JSON_OPTIONS, **schema, **{key: definitions[key] for key in used}}


def _mark(text: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """Return a mark as grammars write it: a special token by its id, other text as it is."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    special = [token_id for token_id, token in added.items() if token.special and token.content == text]
    return f"<[{special[0]}]>" if special else json.dumps(text)
