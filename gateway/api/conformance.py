"""List every field of the routes as docs/gateway.md shows it: `python -m spectrumkv.gateway.api.conformance`."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from spectrumkv.gateway.api.chat import ChatFields, MessageFields
from spectrumkv.gateway.api.completion import CompletionFields
from spectrumkv.gateway.api.fields import RequestFields
from spectrumkv.gateway.api.kv import KvFields
from spectrumkv.gateway.api.sampling import SamplingFields, StreamOptions
from spectrumkv.gateway.api.structured import JsonSchemaFields, ResponseFormat, StructuredOutputs
from spectrumkv.gateway.api.tokens import DetokenizeFields, TokenizeFields
from spectrumkv.gateway.api.tools import CalledFunctionFields, FunctionFields, ToolCallFields, ToolFields

# The tables, and whose fields they have. The first one's fields are those of both completion routes.
TABLES: tuple[tuple[str, type[RequestFields]], ...] = (
    ("`/v1/completions` and `/v1/chat/completions`", SamplingFields),
    ("`/v1/completions` alone", CompletionFields),
    ("`/v1/chat/completions` alone", ChatFields),
    ("a message of `messages`", MessageFields),
    ("a call of `tool_calls`", ToolCallFields),
    ("`function` of a call", CalledFunctionFields),
    ("a tool of `tools`", ToolFields),
    ("`function` of a tool", FunctionFields),
    ("`stream_options`", StreamOptions),
    ("`kv`", KvFields),
    ("`response_format`", ResponseFormat),
    ("`response_format.json_schema`", JsonSchemaFields),
    ("`structured_outputs`", StructuredOutputs),
    ("`/tokenize`", TokenizeFields),
    ("`/detokenize`", DetokenizeFields),
)
SUPPORTED, REFUSED, IGNORED = "supported", "refused", "ignored"


@dataclass(frozen=True)
class Row:
    """Describe one field.

    Attributes:
        name: of the field.
        origin: whose field it is: the OpenAI API's, vLLM's or our own.
        treatment: "supported", "refused" or "ignored".
        meaning: what it does; why it is refused; or what it is for.
    """

    name: str
    origin: str
    treatment: str
    meaning: str


def rows_of(kind: type[RequestFields]) -> list[Row]:
    """Return the fields of a kind of body that its base class does not have; supported ones come first."""
    base = kind.__bases__[0]
    inherited = set(_names(base)) if issubclass(base, RequestFields) else set()
    return [row for row in _all_rows(kind) if row.name not in inherited]


def _names(kind: type[RequestFields]) -> Iterator[str]:
    yield from (*kind.names(), *kind.refused, *kind.ignored)


def _all_rows(kind: type[RequestFields]) -> Iterator[Row]:
    for name, field in kind.names().items():
        more = field.json_schema_extra
        origin = str(more["origin"]) if isinstance(more, dict) else ""
        yield Row(name, origin, SUPPORTED, field.description or "")
    for name, refused in kind.refused.items():
        neutral = ", ".join(f"`{json.dumps(one)}`" for one in refused.neutral)
        through = f" ({neutral} asks for nothing)" if neutral else ""
        yield Row(name, refused.origin, REFUSED, refused.reason + through)
    for name, ignored in kind.ignored.items():
        yield Row(name, ignored.origin, IGNORED, ignored.reason)


def markdown() -> str:
    """Return all tables as Markdown."""
    return "\n".join(line for title, kind in TABLES for line in _table(title, kind))


def _table(title: str, kind: type[RequestFields]) -> Iterator[str]:
    yield f"### Fields of {title}"
    yield ""
    yield "| field | of | here | meaning, or why not |"
    yield "| --- | --- | --- | --- |"
    for row in rows_of(kind):
        yield f"| `{row.name}` | {row.origin} | {row.treatment} | {row.meaning} |"
    yield ""


if __name__ == "__main__":
    sys.stdout.write(markdown())
