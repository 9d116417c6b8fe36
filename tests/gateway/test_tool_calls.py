"""Tool calls over HTTP: in whole answers, in streams, in conversations; and what is refused."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict

from tests.client.fake_servers import Answer as Script
from tests.client.fake_servers import FakePrefill, finished, token
from tests.gateway.running import RunningGateway, running_gateway
from tests.services.pair import running_pair
from tests.tiny_models import build_tiny_model

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Bonn", "Ulm"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": SCHEMA}}
TIME = {"type": "function", "function": {"name": "time"}}
TOOLS = [WEATHER, TIME]
NAMED = {"type": "function", "function": {"name": "weather"}}
# How models of each format call weather and then time; after some text, where the format has that.
WRITTEN = {
    "hermes": 'Let me see. <tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>',
    "llama3_json": '{"name": "weather", "parameters": {"city": "Ulm"}}; {"name": "time", "parameters": {}}',
    "mistral": '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Ulm"}}, {"name": "time", "arguments": {}}]',
}
CALLS = [("weather", '{"city": "Ulm"}'), ("time", "{}")]


def saying(text: str, characters: int = 3, ends: str = "STOP", answers: int = 1) -> Script:
    """Return the script of a prefill that says a text in tokens of so many characters, once for each answer."""
    pieces = [text[at : at + characters] for at in range(0, len(text), characters)]

    def script(request: Any, context: Any) -> Iterator[Any]:
        for index, piece in enumerate(pieces):
            last = ends if index == len(pieces) - 1 else None
            for answer in range(answers):
                yield token(index, piece, answer=answer, ends=last)
        yield finished(len(pieces) * answers, ends)

    return script


def named_and_put_together(deltas: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the calls of a stream, as a client of the API puts them together."""
    calls: list[dict[str, Any]] = []
    for piece in (one for delta in deltas for one in delta.get("tool_calls", ())):
        if piece["index"] == len(calls):
            assert piece["type"] == "function"
            calls.append({"id": piece["id"], "type": piece["type"], "function": dict(piece["function"])})
        else:
            assert piece.keys() == {"index", "function"}
            assert piece["function"].keys() == {"arguments"}
            calls[piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]
    return calls


def named(calls: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(one["function"]["name"], one["function"]["arguments"]) for one in calls]


@pytest.mark.parametrize("form", WRITTEN)
def test_a_whole_answer_has_calls(gateway: RunningGateway, prefill: FakePrefill, form: str) -> None:
    prefill.answer, prefill.tool_call_format = saying(WRITTEN[form]), form
    (choice,) = gateway.chat(tools=TOOLS).json["choices"]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert message["content"] == ("Let me see. " if form == "hermes" else None)
    assert named(message["tool_calls"]) == CALLS
    assert len({one["id"] for one in message["tool_calls"]}) == 2
    assert {one["type"] for one in message["tool_calls"]} == {"function"}


@pytest.mark.parametrize("characters", [1, 3, 200])
@pytest.mark.parametrize("form", WRITTEN)
def test_a_stream_has_calls_in_pieces(
    gateway: RunningGateway, prefill: FakePrefill, form: str, characters: int
) -> None:
    prefill.answer, prefill.tool_call_format = saying(WRITTEN[form], characters), form
    choices = [one["choices"][0] for one in gateway.chat(tools=TOOLS, stream=True).events]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    deltas = [one["delta"] for one in choices]
    assert all(len(one.get("tool_calls", [None])) == 1 for one in deltas)
    assert named(named_and_put_together(deltas)) == CALLS
    assert "".join(one.get("content", "") for one in deltas) == ("Let me see. " if form == "hermes" else "")
    assert [one["finish_reason"] for one in choices if one["finish_reason"]] == ["tool_calls"]
    assert choices[-1]["delta"] == {}


def test_answers_of_one_request_are_read_each_by_itself(gateway: RunningGateway, prefill: FakePrefill) -> None:
    prefill.answer = saying(WRITTEN["hermes"], answers=2)
    events = gateway.chat(tools=TOOLS, stream=True, n=2).events
    for place in range(2):
        choices = [one["choices"][0] for one in events if one["choices"][0]["index"] == place]
        assert named(named_and_put_together([one["delta"] for one in choices])) == CALLS
        assert choices[-1]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("text", ["<tool", "<tool_call>\nno call", 'A <tool_call>{"name": 5}'])
def test_what_looks_like_a_call_and_is_none_is_text(gateway: RunningGateway, prefill: FakePrefill, text: str) -> None:
    prefill.answer = saying(text)
    (choice,) = gateway.chat(tools=TOOLS).json["choices"]
    assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
    assert choice["finish_reason"] == "stop"
    choices = [one["choices"][0] for one in gateway.chat(tools=TOOLS, stream=True).events]
    assert "".join(one["delta"].get("content", "") for one in choices) == text
    assert choices[-1]["finish_reason"] == "stop"


def test_an_answer_that_is_cut_off_says_so(gateway: RunningGateway, prefill: FakePrefill) -> None:
    prefill.answer = saying('<tool_call>\n{"name": "weather", "arguments": {"ci', ends="LENGTH")
    (choice,) = gateway.chat(tools=TOOLS).json["choices"]
    assert choice["finish_reason"] == "length"
    assert named(choice["message"]["tool_calls"]) == [("weather", '{"ci')]
    assert gateway.chat(tools=TOOLS, stream=True).events[-1]["choices"][0]["finish_reason"] == "length"


def test_each_token_has_its_log_probability_once(gateway: RunningGateway, prefill: FakePrefill) -> None:
    prefill.answer = saying(WRITTEN["hermes"])
    events = gateway.chat(tools=TOOLS, stream=True, logprobs=True, return_token_ids=True).events
    choices = [one["choices"][0] for one in events]
    tokens = -(-len(WRITTEN["hermes"]) // 3)
    assert [token_id for one in choices for token_id in one.get("token_ids", ())] == [*range(100, 100 + tokens)]
    assert sum(len(one["logprobs"]["content"]) for one in choices if one["logprobs"]) == tokens


@pytest.mark.parametrize("fields", [{}, {"tools": []}, {"tools": TOOLS, "tool_choice": "none"}])
def test_calls_stay_in_the_text_where_the_model_may_make_none(
    gateway: RunningGateway, prefill: FakePrefill, fields: dict[str, Any]
) -> None:
    prefill.answer, prefill.tool_call_format = saying(WRITTEN["hermes"]), ""
    (choice,) = gateway.chat(**fields).json["choices"]
    assert choice["message"]["content"] == WRITTEN["hermes"]
    assert "tool_calls" not in choice["message"]


@pytest.mark.parametrize(
    ("choice", "asked"),
    [
        (None, {"toolChoice": "TOOL_CHOICE_AUTO"}),
        ("required", {"toolChoice": "TOOL_CHOICE_REQUIRED"}),
        (NAMED, {"toolChoice": "TOOL_CHOICE_REQUIRED", "toolName": "weather"}),
    ],
)
def test_a_conversation_goes_to_prefill_with_its_tools(
    gateway: RunningGateway, prefill: FakePrefill, choice: Any, asked: dict[str, str]
) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
    messages = [
        {"role": "user", "content": "Is it fine in Ulm?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "It rains."}]},
    ]
    body = {"messages": messages, "tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": True}
    assert gateway.ask("POST", "/v1/chat/completions", body).status == 200
    assert MessageToDict(prefill.requests[-1].chat) == {
        "messages": [
            {"role": "user", "content": "Is it fine in Ulm?"},
            {"role": "assistant", "toolCalls": [{"id": "c1", "name": "weather", "arguments": '{"city": "Ulm"}'}]},
            {"role": "tool", "toolCallId": "c1", "content": "It rains."},
        ],
        "tools": [
            {"name": "weather", "description": "Tells it.", "parameters": json.dumps(SCHEMA)},
            {"name": "time"},
        ],
        **asked,
    }


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"tool_choice": "required"}, "tool_choice", "tool_choice wants a call and there are no tools"),
        ({"tool_choice": NAMED}, "tool_choice", "tool_choice wants a call and there are no tools"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice", "tool_choice is 'any'; allowed: \"auto\""),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice", "tool_choice is {"),
        ({"tools": TOOLS, "tool_choice": NAMED | {"more": 1}}, "tool_choice", "tool_choice is {"),
        (
            {"tools": [TIME, {"type": "function", "function": {"name": "weather", "strict": True}}]},
            "tools.1.function.strict",
            "strict is True and tool_choice leaves it to the model",
        ),
        ({"tools": [{"type": "custom", "custom": {}}]}, "custom", "'custom' is no field here"),
        ({"tools": TOOLS, "parallel_tool_calls": False}, "parallel_tool_calls", "parallel_tool_calls is False"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "content is missing"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.tool_call_id", "tool_call_id is missing"),
        (
            {"messages": [{"role": "user", "content": "a", "tool_call_id": "1"}]},
            "messages.0.tool_call_id",
            "tool_call_id is in a message of the role user",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    gateway: RunningGateway, prefill: FakePrefill, fields: dict[str, Any], param: str, message: str
) -> None:
    answer = gateway.chat(**fields)
    assert answer.status == 400
    assert answer.error["message"].startswith(message)
    assert answer.error["param"].endswith(param)
    assert not prefill.requests


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("", "tools are given and the model has no chat template; send a prompt to /v1/completions"),
        (
            "pythonic",
            "tools are given and the model writes calls in the form 'pythonic'; the gateway reads hermes, "
            "llama3_json, mistral",
        ),
    ],
)
def test_tools_of_a_model_whose_calls_cannot_be_read_are_refused(
    gateway: RunningGateway, prefill: FakePrefill, form: str, message: str
) -> None:
    prefill.tool_call_format = form
    answer = gateway.chat(tools=TOOLS)
    assert answer.status == 400
    assert answer.error["message"] == message
    assert answer.error["param"] == "tools"
    assert not prefill.requests


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    """A gateway in front of a real pair on a small model with random weights."""
    model: Path = build_tiny_model("llama", tmp_path_factory.mktemp("models") / "llama")
    with (
        running_pair(model, decode={"kv_memory": "64MiB"}) as pair,
        running_gateway(f"127.0.0.1:{pair.prefill_port}") as running,
    ):
        yield running


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["required", NAMED])
def test_real_services_make_the_call_that_is_required(served: RunningGateway, choice: Any) -> None:
    asked = {"tools": [WEATHER], "tool_choice": choice, "temperature": 1, "seed": 2, "max_tokens": 200}
    (whole,) = served.chat(**asked).json["choices"]
    calls = whole["message"]["tool_calls"]
    assert whole["finish_reason"] == "tool_calls"
    assert whole["message"]["content"] is None
    assert {one["function"]["name"] for one in calls} == {"weather"}
    assert {json.loads(one["function"]["arguments"])["city"] for one in calls} <= {"Bonn", "Ulm"}
    choices = [one["choices"][0] for one in served.chat(**asked, stream=True).events]
    assert named(named_and_put_together([one["delta"] for one in choices])) == named(calls)
    assert choices[-1]["finish_reason"] == "tool_calls"


@pytest.mark.slow
def test_real_services_refuse_the_name_of_no_tool(served: RunningGateway) -> None:
    answer = served.chat(tools=[TIME], tool_choice=NAMED)
    assert answer.status == 400
    assert answer.error["message"] == "tool_name is 'weather'; allowed: time"
