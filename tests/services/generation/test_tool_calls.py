"""Tools in a request: required calls are valid in any answer, and the form is what the service says."""

import json

import pytest

from spectrumkv.client.request import Message, Request, Sampling
from spectrumkv.client.structured_output import StructuredOutput
from spectrumkv.client.tools import Tool, Tools
from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.tool_calls import FORMATS, CallDelta, ToolCallParser
from tests.services.pair import Pair

WEATHER = Tool(
    "weather",
    "Tells the weather.",
    '{"type": "object", "properties": {"city": {"enum": ["Bonn", "Ulm"]}}, "required": ["city"], '
    '"additionalProperties": false}',
)
ASKED = [Message("user", "How is the weather in Ulm?")]
DRAWN = Sampling(max_tokens=120, temperature=1.0, seed=2)


def test_a_required_call_comes_whatever_the_model_would_say(llama_pair: Pair) -> None:
    with llama_pair.client() as client:
        form = FORMATS[client.server_info().tool_call_format]
        tools = Tools((WEATHER, Tool("time")), "required", "weather")
        completion = client.send(Request(prompt=ASKED, sampling=DRAWN, tools=tools)).result()
    parser = ToolCallParser(form)
    deltas = [delta for token in completion.tokens for delta in parser.push(token.text)] + parser.finish()
    calls = [delta for delta in deltas if isinstance(delta, CallDelta)]
    assert calls == deltas
    assert calls[0].name == "weather"
    first = "".join(call.arguments for call in calls if call.index == 0)
    assert json.loads(first)["city"] in ("Bonn", "Ulm")


def test_tools_lengthen_the_prompt_unless_they_are_not_to_be_shown(llama_pair: Pair) -> None:
    with llama_pair.client() as client:
        lengths = [
            client.generate(ASKED, sampling=Sampling(max_tokens=1), tools=tools).result().usage.prompt_tokens
            for tools in (Tools(), Tools((WEATHER,), "none"), Tools((WEATHER,)))
        ]
    assert lengths[0] == lengths[1] < lengths[2]


def test_a_required_call_leaves_no_room_for_another_form(llama_pair: Pair) -> None:
    sampling = Sampling(structured_output=StructuredOutput(regex="a"))
    with llama_pair.client() as client, pytest.raises(InvalidArgumentError, match="leave out structured_output"):
        client.generate(ASKED, sampling=sampling, tools=Tools((WEATHER,), "required")).result()
