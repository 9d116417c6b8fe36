"""Answers with tool calls, cut anywhere, become the same text and the same calls."""

import json
import re
import subprocess
import sys
import time
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectrumkv.common.tool_calls import FORMATS, CallDelta, ContentDelta, ToolCallParser, format_of_template

WEATHER = {"city": 'Köln "am Rhein" }{', "days": [1, 2, {"deep": "</tool_call>"}], "ok": True, "none": None}
BODY = json.dumps({"name": "weather", "arguments": WEATHER})


def read(form: str, *pieces: str) -> tuple[str, list[tuple[str, str]]]:
    """The answer's text, and name and arguments of each call."""
    ids = count()
    parser = ToolCallParser(FORMATS[form], lambda: f"call-{next(ids)}")
    deltas = [delta for piece in pieces for delta in parser.push(piece)] + parser.finish()
    text = "".join(delta.text for delta in deltas if isinstance(delta, ContentDelta))
    calls: list[list[str]] = []
    for delta in deltas:
        if isinstance(delta, CallDelta) and delta.id:
            assert (delta.index, delta.id) == (len(calls), f"call-{len(calls)}")
            calls.append([delta.name, delta.arguments])
        elif isinstance(delta, CallDelta):
            assert delta.index == len(calls) - 1
            calls[-1][1] += delta.arguments
    assert parser.calls == len(calls)
    return text, [(name, arguments) for name, arguments in calls]


HERMES = f"Let me see.\n<tool_call>\n{BODY}\n</tool_call>\n<tool_call>\n{BODY}\n</tool_call>"
ANSWERS = {
    "two calls": ("hermes", HERMES, "Let me see.\n", 2),
    "a list of calls": ("hermes", f"<tool_call>[{BODY}, {BODY}]</tool_call>", "", 2),
    "no end": ("hermes", f"<tool_call>{BODY}", "", 1),
    "cut off in the end": ("hermes", f"<tool_call>{BODY}\n</tool_c", "", 1),
    "text after": ("hermes", f"<tool_call>{BODY}</tool_call> Done.", " Done.", 1),
    "arguments first": (
        "hermes",
        f'<tool_call>{{"arguments": {json.dumps(WEATHER)}, "name": "weather"}}</tool_call>',
        "",
        1,
    ),
    "arguments as text": (
        "hermes",
        f'<tool_call>{{"name": "weather", "arguments": {json.dumps(json.dumps(WEATHER))}}}</tool_call>',
        "",
        1,
    ),
    "llama": ("llama3_json", json.dumps({"name": "weather", "parameters": WEATHER}), "", 1),
    "llama, two": ("llama3_json", "; ".join([json.dumps({"name": "weather", "parameters": WEATHER})] * 2), "", 2),
    "llama with its tag": ("llama3_json", f"<|python_tag|>{BODY}", "", 1),
    "mistral": ("mistral", f"[TOOL_CALLS] [{BODY}, {BODY}]", "", 2),
    "mistral without its mark": ("mistral", f" [{BODY}]", "", 1),
    "mistral after text": ("mistral", f"I look.[TOOL_CALLS][{BODY}]", "I look.", 1),
}


@pytest.mark.parametrize("name", ANSWERS)
@given(cuts=st.sets(st.integers(1, 400), max_size=12))
def test_text_and_calls_are_those_of_the_whole_answer(name: str, cuts: set[int]) -> None:
    form, answer, text, calls = ANSWERS[name]
    places = sorted(cut for cut in cuts if cut < len(answer))
    pieces = [answer[a:b] for a, b in zip([0, *places], [*places, len(answer)], strict=True)]
    found_text, found_calls = read(form, *pieces)
    assert found_text == text
    assert [(name, json.loads(arguments)) for name, arguments in found_calls] == [("weather", WEATHER)] * calls


@pytest.mark.parametrize(
    ("form", "answer"),
    [
        ("hermes", "Plain text with < and <tool and <tool_cal."),
        ("hermes", "<tool_call>no call</tool_call>"),
        ("hermes", '<tool_call>{"name": 3}</tool_call>'),
        ("hermes", '<tool_call>{"x"'),
        ("hermes", "a <tool_call>"),
        ("llama3_json", '{"name": "Ada", "age": 36}'),
        ("llama3_json", "The answer is {}."),
        ("llama3_json", '{"name": "Ada"'),
        ("llama3_json", "  "),
        ("mistral", "[1, 2, 3] is a list"),
        ("mistral", "[TOOL"),
        ("mistral", '[{"city": "Bonn"}]'),
    ],
)
def test_what_is_no_call_stays_text(form: str, answer: str) -> None:
    for pieces in ([answer], list(answer)):
        text, calls = read(form, *pieces)
        assert calls == []
        assert text.strip() == answer.strip()


@given(
    answer=st.text('<tool_cal>/{}[]":, \\ name argumentsTOOL_CALLS', max_size=80), form=st.sampled_from(list(FORMATS))
)
def test_any_answer_is_read_and_cuts_do_not_matter(answer: str, form: str) -> None:
    assert read(form, answer) == read(form, *answer)


def test_arguments_arrive_as_they_are_written() -> None:
    parser = ToolCallParser(FORMATS["hermes"])
    (begun,) = parser.push('<tool_call>{"name": "f", "arguments": {"a": ')
    assert (begun.name, begun.arguments) == ("f", '{"a": ')
    assert re.fullmatch("[0-9a-f]{9}", begun.id)
    assert parser.push('"b') == [CallDelta(0, "", "", '"b')]
    assert parser.push('"}') == [CallDelta(0, "", "", '"}')]
    assert parser.push("}\n</tool_call>") == []
    assert parser.finish() == []


@pytest.mark.parametrize(
    ("form", "answer"),
    [
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "%s"}}</tool_call>'),
        ("llama3_json", '{"no call": "%s"}'),
    ],
)
def test_a_long_answer_takes_no_longer_a_character(form: str, answer: str) -> None:
    def seconds(length: int) -> float:
        started = time.process_time()
        read(form, answer % ("x" * length))
        return time.process_time() - started

    seconds(1000)
    # Where what came before is copied at each character, 16 times as many take more than 100 times as long.
    assert seconds(320_000) < 64 * max(seconds(20_000), 0.02)


def test_a_call_without_arguments_has_an_empty_object() -> None:
    assert read("hermes", '<tool_call>{"name": "now"}</tool_call>') == ("", [("now", "{}")])


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ messages }}", "hermes"),
        ("{% if tools %}<tool_call>{% endif %}", "hermes"),
        ("{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]", "mistral"),
        ('{% if tools %}{"name": function name, "parameters": dictionary}{{ \'"parameters": \' }}', "llama3_json"),
    ],
)
def test_the_format_is_the_templates(template: str, name: str) -> None:
    assert format_of_template(template).name == name


def test_the_parser_needs_no_torch() -> None:
    code = (
        "import spectrumkv.common.tool_calls, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
