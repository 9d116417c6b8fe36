"""Each field of the tables in docs/gateway.md does what its row says."""

import json
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict

from spectrumkv.gateway.api import conformance
from spectrumkv.gateway.api.completion import CompletionFields
from spectrumkv.gateway.api.conformance import IGNORED, REFUSED, SUPPORTED, TABLES, Row, markdown, rows_of
from spectrumkv.gateway.api.fields import RequestFields
from tests.client.fake_servers import FakePrefill
from tests.gateway.running import Answer, RunningGateway

PAGE = Path(__file__).parents[2] / "docs" / "gateway.md"
MESSAGES = [{"role": "user", "content": "Hello"}]
TOOLS = [{"type": "function", "function": {"name": "weather"}}]
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
CALLED = [{"role": "assistant", "tool_calls": [CALL]}]
# Where the fields of each table stand in a body: the route, the least body, and the path to the object.
PLACES: dict[str, tuple[str, dict[str, Any], tuple[Any, ...]]] = {
    "SamplingFields": ("/v1/completions", {"prompt": "x"}, ()),
    "CompletionFields": ("/v1/completions", {"prompt": "x"}, ()),
    "ChatFields": ("/v1/chat/completions", {"messages": MESSAGES}, ()),
    "MessageFields": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}, ("messages", 0)),
    "ToolCallFields": ("/v1/chat/completions", {"messages": CALLED}, ("messages", 0, "tool_calls", 0)),
    "CalledFunctionFields": (
        "/v1/chat/completions",
        {"messages": CALLED},
        ("messages", 0, "tool_calls", 0, "function"),
    ),
    "ToolFields": ("/v1/chat/completions", {"messages": MESSAGES, "tools": TOOLS}, ("tools", 0)),
    "FunctionFields": (
        "/v1/chat/completions",
        {"messages": MESSAGES, "tools": TOOLS, "tool_choice": "required"},
        ("tools", 0, "function"),
    ),
    "StreamOptions": ("/v1/completions", {"prompt": "x", "stream": True, "stream_options": {}}, ("stream_options",)),
    "KvFields": ("/v1/completions", {"prompt": "x", "kv": {}}, ("kv",)),
    "ResponseFormat": ("/v1/completions", {"prompt": "x", "response_format": {"type": "text"}}, ("response_format",)),
    "JsonSchemaFields": (
        "/v1/completions",
        {"prompt": "x", "response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
        ("response_format", "json_schema"),
    ),
    "StructuredOutputs": (
        "/v1/completions",
        {"prompt": "x", "structured_outputs": {"regex": "a"}},
        ("structured_outputs",),
    ),
    "TokenizeFields": ("/tokenize", {"prompt": "x"}, ()),
    "DetokenizeFields": ("/detokenize", {"tokens": [5]}, ()),
}


def _called(**changes: str) -> dict[str, Any]:
    """Return the message of `CALLED` as prefill is sent it."""
    return {"role": "assistant", "toolCalls": [{"id": "1", "name": "weather", "arguments": "{}"} | changes]}


# For each supported field a value, and what prefill is then asked: a path in its request, and the value there. Fields
# that change the answer alone have None as the path.
SUPPORTED_VALUES: dict[str, dict[str, tuple[Any, str | None, Any]]] = {
    "SamplingFields": {
        "model": ("tiny-llama", "model", "tiny-llama"),
        "stream": (True, None, None),
        "stream_options": (None, None, None),
        "temperature": (0.5, "sampling.temperature", 0.5),
        "top_p": (0.5, "sampling.topP", 0.5),
        "top_k": (5, "sampling.topK", 5),
        "repetition_penalty": (1.5, "sampling.repetitionPenalty", 1.5),
        "presence_penalty": (0.5, "sampling.presencePenalty", 0.5),
        "frequency_penalty": (0.5, "sampling.frequencyPenalty", 0.5),
        "min_p": (0.5, "sampling.minP", 0.5),
        "logit_bias": ({"5": -1.5}, "sampling.logitBias", {"5": -1.5}),
        "min_tokens": (5, "sampling.minTokens", 5),
        "bad_words": (["a"], "sampling.badWords", ["a"]),
        "n": (1, "sampling.n", 1),
        "response_format": ({"type": "json_object"}, "sampling.structuredOutput", {"jsonObject": {}}),
        "structured_outputs": ({"regex": "a+"}, "sampling.structuredOutput", {"regex": "a+"}),
        "prompt_logprobs": (2, "promptLogprobs", 2),
        "seed": (-1, "sampling.seed", str(2**64 - 1)),
        "stop": ("a", "sampling.stop", ["a"]),
        "stop_token_ids": ([5], "sampling.stopTokenIds", [5]),
        "ignore_eos": (True, "sampling.ignoreEos", True),
        "return_token_ids": (True, None, None),
        "return_tokens_as_token_ids": (True, None, None),
        "request_id": ("mine", "requestId", "mine"),
        "kv": ({"budget": 0.5}, "kv", {"budget": 0.5}),
    },
    "CompletionFields": {
        "prompt": ([5, 6], "tokenIds", {"ids": [5, 6]}),
        "max_tokens": (5, "sampling.maxTokens", 5),
        "logprobs": (2, "sampling.logprobs", 2),
        "echo": (True, "echo", True),
    },
    "ChatFields": {
        "messages": (MESSAGES, "chat.messages", MESSAGES),
        "tools": (TOOLS, "chat.tools", [{"name": "weather"}]),
        "tool_choice": ("required", "chat.toolChoice", "TOOL_CHOICE_REQUIRED"),
        "max_completion_tokens": (5, "sampling.maxTokens", 5),
        "max_tokens": (5, "sampling.maxTokens", 5),
        "logprobs": (True, "sampling.logprobs", 0),
        "top_logprobs": (2, "sampling.logprobs", 2),
    },
    "MessageFields": {
        "role": ("developer", "chat.messages", [{"role": "system", "content": "Hello"}]),
        "content": (
            [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            "chat.messages",
            [{"role": "user", "content": "ab"}],
        ),
        "tool_calls": (
            [CALL],
            "chat.messages",
            [
                {
                    "role": "assistant",
                    "content": "Hello",
                    "toolCalls": [{"id": "1", "name": "weather", "arguments": "{}"}],
                }
            ],
        ),
        "tool_call_id": ("1", "chat.messages", [{"role": "tool", "content": "Hello", "toolCallId": "1"}]),
    },
    "ToolCallFields": {
        "id": ("2", "chat.messages", [_called(id="2")]),
        "type": ("function", "chat.messages", [_called()]),
        "function": ({"name": "time", "arguments": "{}"}, "chat.messages", [_called(name="time")]),
    },
    "CalledFunctionFields": {
        "name": ("time", "chat.messages", [_called(name="time")]),
        "arguments": ('{"a": 1}', "chat.messages", [_called(arguments='{"a": 1}')]),
    },
    "ToolFields": {
        "type": ("function", "chat.tools", [{"name": "weather"}]),
        "function": ({"name": "time"}, "chat.tools", [{"name": "time"}]),
    },
    "FunctionFields": {
        "name": ("time", "chat.tools", [{"name": "time"}]),
        "description": ("Says it.", "chat.tools", [{"name": "weather", "description": "Says it."}]),
        "parameters": ({"type": "object"}, "chat.tools", [{"name": "weather", "parameters": '{"type": "object"}'}]),
        "strict": (True, "chat.toolChoice", "TOOL_CHOICE_REQUIRED"),
    },
    "StreamOptions": {"include_usage": (True, None, None)},
    "KvFields": {
        "budget": (0.3, "kv.budget", 0.3),
        "policy": ("greedy", "kv.policy", "greedy"),
        "scorer": ("random", "kv.scorer", "random"),
        "codec": ("absmax", "kv.codec", "absmax"),
        "scope": ("model", "kv.scope", "model"),
        "map": (True, "kvMap", "KV_MAP_DETAIL_TOKENS"),
    },
    "ResponseFormat": {
        "type": ("json_object", "sampling.structuredOutput", {"jsonObject": {}}),
        "json_schema": ({"schema": {}}, None, None),
    },
    "JsonSchemaFields": {
        "schema": ({"type": "null"}, "sampling.structuredOutput", {"jsonSchema": '{"type": "null"}'})
    },
    "StructuredOutputs": {
        "json": ({"type": "null"}, "sampling.structuredOutput", {"jsonSchema": '{"type": "null"}'}),
        "json_object": (True, "sampling.structuredOutput", {"jsonObject": {}}),
        "regex": ("b", "sampling.structuredOutput", {"regex": "b"}),
        "choice": (["a", "b"], "sampling.structuredOutput", {"choice": {"texts": ["a", "b"]}}),
        "grammar": ("start: A", "sampling.structuredOutput", {"grammar": "start: A"}),
    },
    "TokenizeFields": {
        "model": ("tiny-llama", "model", "tiny-llama"),
        "prompt": ("y", "text", "y"),
        "messages": (MESSAGES, "chat.messages", MESSAGES),
        "tools": (TOOLS, "chat.tools", [{"name": "weather"}]),
        "return_token_strs": (True, None, None),
    },
    "DetokenizeFields": {"model": ("tiny-llama", None, None), "tokens": ([7], None, None)},
}
# Fields that only go with others, or only without.
BESIDE: dict[tuple[str, str], dict[str, Any]] = {
    ("ChatFields", "top_logprobs"): {"logprobs": True},
    ("ChatFields", "tool_choice"): {"tools": TOOLS},
    ("MessageFields", "tool_calls"): {"role": "assistant"},
    ("MessageFields", "tool_call_id"): {"role": "tool"},
    ("TokenizeFields", "messages"): {"prompt": None},
    ("TokenizeFields", "tools"): {"prompt": None, "messages": MESSAGES},
}
ALONE = {"json", "json_object", "choice", "grammar"}


def rows(treatment: str) -> list[Any]:
    return [
        pytest.param(kind, row, id=f"{kind.__name__}.{row.name}")
        for _, kind in TABLES
        for row in rows_of(kind)
        if row.treatment == treatment
    ]


def ask(gateway: RunningGateway, kind: type[RequestFields], fields: dict[str, Any]) -> Answer:
    """Ask with some fields of one table."""
    route, body, path = PLACES[kind.__name__]
    body = json.loads(json.dumps(body))
    inner: Any = body
    for key in path:
        inner = inner[key]
    if ALONE & fields.keys():
        inner.pop("regex", None)
    inner.update(fields)
    return gateway.ask("POST", route, body)


def asked_of(prefill: FakePrefill) -> dict[str, Any]:
    message = prefill.requests.pop()
    return MessageToDict(message)


def at(message: dict[str, Any], path: str) -> Any:
    found: Any = message
    for key in path.split("."):
        found = found.get(key) if isinstance(found, dict) else None
    return found


@pytest.mark.parametrize(("kind", "row"), rows(SUPPORTED))
def test_a_supported_field(
    gateway: RunningGateway, prefill: FakePrefill, kind: type[RequestFields], row: Row
) -> None:
    value, path, expected = SUPPORTED_VALUES[kind.__name__][row.name]
    without = ask(gateway, kind, BESIDE.get((kind.__name__, row.name), {}))
    answer = ask(gateway, kind, {row.name: value, **BESIDE.get((kind.__name__, row.name), {})})
    assert answer.status == 200, answer.body
    if path is not None:
        assert at(asked_of(prefill), path) == expected
        return
    # Where it is not the request to prefill that changes, the answer does; or the value is the default one.
    changes = {"stream", "include_usage", "return_token_ids", "return_token_strs", "tokens"}
    if row.name in changes:
        assert answer.body != without.body
        assert len(answer.body) != len(without.body) or row.name == "tokens"


@pytest.mark.parametrize(("kind", "row"), rows(REFUSED))
def test_a_refused_field_is_named(
    gateway: RunningGateway, prefill: FakePrefill, kind: type[RequestFields], row: Row
) -> None:
    answer = ask(gateway, kind, {row.name: "something"})
    assert answer.status == 400
    assert answer.error["param"].split(".")[-1] == row.name
    assert answer.error["message"].startswith(f"{row.name} is 'something'; {kind.refused[row.name].reason}")
    assert not prefill.requests
    for neutral in (None, *kind.refused[row.name].neutral):
        assert ask(gateway, kind, {row.name: neutral}).status == 200


@pytest.mark.parametrize(("kind", "row"), rows(IGNORED))
def test_an_ignored_field_changes_nothing(
    gateway: RunningGateway, prefill: FakePrefill, kind: type[RequestFields], row: Row
) -> None:
    asked = []
    for fields in ({}, {row.name: "something"}):
        assert ask(gateway, kind, fields).status == 200
        asked.append(asked_of(prefill) | {"requestId": ""})
    assert asked[0] == asked[1]


def test_every_table_is_tested() -> None:
    assert {kind.__name__ for _, kind in TABLES} == PLACES.keys() == SUPPORTED_VALUES.keys()


def test_the_page_has_the_tables() -> None:
    begin, end = "<!-- written by conformance.py -->\n\n", "\n<!-- end -->"
    page = PAGE.read_text()
    shown = page.partition(begin)[2].partition(end)[0]
    assert shown == markdown(), "write it anew: python -m spectrumkv.gateway.api.conformance"


def test_fields_that_both_routes_have_stand_in_one_table_only() -> None:
    shared = {row.name for row in rows_of(conformance.SamplingFields)}
    assert "temperature" in shared
    assert not shared & {row.name for row in rows_of(CompletionFields)}
