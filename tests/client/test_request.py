import numpy as np
import pytest

from spectrumkv.client.request import KvChoice, Message, Request, Sampling, TokenIds, given
from spectrumkv.client.structured_output import StructuredOutput
from spectrumkv.client.tools import Tool, ToolCall, Tools
from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.v1 import prefill_pb2


def test_what_is_not_asked_for_stays_unset():
    message = Request(prompt="hello").to_proto()
    assert message.text == "hello"
    assert not message.sampling.ListFields()
    assert not message.kv.ListFields()
    assert (message.model, message.request_id) == ("", "")


def test_zero_is_asked_for():
    sampling = Sampling(temperature=0.0, top_k=0, seed=0, logprobs=0).to_proto()
    assert [field.name for field, _ in sampling.ListFields()] == ["temperature", "top_k", "seed", "logprobs"]
    assert Request(prompt="x", kv=KvChoice(budget=0.0)).to_proto().kv.HasField("budget")


def test_every_field_reaches_the_message():
    sampling = Sampling(
        max_tokens=7,
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        repetition_penalty=1.25,
        seed=2**64 - 1,
        stop=("\n", "END"),
        stop_token_ids=(2, 5),
        ignore_eos=True,
        logprobs=3,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        min_p=0.05,
        logit_bias={7: -100.0},
        min_tokens=2,
        bad_words=("dog",),
        n=3,
    )
    kv = KvChoice(budget=0.3, policy="greedy", scorer="attention", codec="absmax", scope="model")
    request = Request(prompt="x", sampling=sampling, kv=kv, model="m", request_id="r")
    message = request.to_proto()
    for choices, sent in ((sampling, message.sampling), (kv, message.kv)):
        for name in given(choices):
            value, arrived = getattr(choices, name), getattr(sent, name)
            assert (tuple(arrived) if isinstance(value, tuple) else arrived) == value, name
    assert not message.sampling.HasField("structured_output")
    assert (message.model, message.request_id) == ("m", "r")
    asked = request.as_json()
    assert asked["sampling"]["seed"] == 2**64 - 1
    assert asked["kv"]["budget"] == 0.3
    assert asked["model"] == "m"


def test_each_kind_of_prompt():
    assert list(Request(prompt=TokenIds((1, 2))).to_proto().token_ids.ids) == [1, 2]
    chat = Request(prompt=[Message("system", "s"), Message("user", "u")])
    assert [(one.role, one.content) for one in chat.to_proto().chat.messages] == [("system", "s"), ("user", "u")]
    assert chat.as_json()["prompt"] == {
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    }


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        (StructuredOutput(json_schema="{}"), "json_schema"),
        (StructuredOutput(json_object=True), "json_object"),
        (StructuredOutput(regex="a+"), "regex"),
        (StructuredOutput(grammar='start: "a"'), "grammar"),
        (StructuredOutput(choice=("yes", "no")), "choice"),
    ],
)
def test_each_form_of_structured_output(form, kind):
    request = Request(prompt="x", sampling=Sampling(structured_output=form))
    assert request.to_proto().sampling.structured_output.WhichOneof("form") == kind
    assert list(request.as_json()["sampling"]["structured_output"]) == [kind]


def test_tools_and_their_calls_reach_the_message():
    call = ToolCall("call-1", "weather", '{"city": "Bonn"}')
    turns = [Message("user", "?"), Message("assistant", "", (call,)), Message("tool", "12", tool_call_id="call-1")]
    tools = Tools((Tool("weather", "Tells it.", '{"type": "object"}'),), "required", "weather")
    request = Request(prompt=turns, tools=tools, echo=True, prompt_logprobs=0)
    chat = request.to_proto().chat
    assert (chat.tools[0].name, chat.tools[0].parameters) == ("weather", '{"type": "object"}')
    assert (chat.tool_choice, chat.tool_name) == (prefill_pb2.TOOL_CHOICE_REQUIRED, "weather")
    assert chat.messages[1].tool_calls[0].arguments == '{"city": "Bonn"}'
    assert chat.messages[2].tool_call_id == "call-1"
    asked = request.as_json()
    assert asked["prompt"]["messages"][1]["tool_calls"][0]["name"] == "weather"
    assert (asked["echo"], asked["prompt_logprobs"]) == (True, 0)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (StructuredOutput, "structured output has no form; allowed: exactly one of json_schema"),
        (lambda: StructuredOutput(regex="a", choice=("b",)), "structured output has regex, choice; allowed"),
        (lambda: Tools(choice="maybe"), "choice is 'maybe'; allowed: auto, none, required"),
        (lambda: Tools(name="f"), "a tool's name, 'f', needs the choice 'required'"),
        (lambda: Tools(("f",)), "tools is .*; allowed: a tuple of Tool"),
        (lambda: Request(prompt="x", tools=Tools((Tool("f"),))), "tools need a conversation"),
        (lambda: Sampling(structured_output="json"), "structured_output is 'json'; allowed: a StructuredOutput, or"),
        (lambda: Sampling(logit_bias=[1]), r"logit_bias is \[1\]; allowed: numbers by token id"),
        (lambda: Sampling(logit_bias={-1: 1.0}), "logit_bias is -1"),
        (lambda: Sampling(n=-1), "n is -1"),
    ],
)
def test_forms_and_tools_that_make_no_sense_are_refused(make, said):
    with pytest.raises(InvalidArgumentError, match=said):
        make()


@pytest.mark.parametrize(("prompt", "kind"), [("", "text"), ([], "chat"), (TokenIds(()), "token_ids")])
def test_an_empty_prompt_is_sent_as_one_for_the_server_to_refuse(prompt, kind):
    assert Request(prompt=prompt).to_proto().WhichOneof("prompt") == kind


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Sampling(max_tokens=-1), "max_tokens is -1"),
        (lambda: Sampling(top_k=2**32), "top_k is 4294967296"),
        (lambda: Sampling(seed=2**64), "seed is"),
        (lambda: Sampling(stop_token_ids=(1, -2)), "stop_token_ids is -2"),
        (lambda: TokenIds((2**32,)), "token id of the prompt is 4294967296"),
    ],
)
def test_numbers_that_cannot_be_carried_are_named(make, named):
    with pytest.raises(InvalidArgumentError, match=named):
        make()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: KvChoice(budget="0.3"), "budget is '0.3'; allowed: a number"),
        (lambda: KvChoice(budget=True), "budget is True; allowed: a number"),
        (lambda: KvChoice(policy=3), "policy is 3; allowed: a text"),
        (lambda: Sampling(max_tokens="2"), "max_tokens is '2'; allowed: a whole number"),
        (lambda: Sampling(max_tokens=2.0), "max_tokens is 2.0; allowed: a whole number"),
        (lambda: Sampling(temperature="hot"), "temperature is 'hot'; allowed: a number"),
        (lambda: Sampling(stop="END"), "stop is 'END'; allowed: texts, such as"),
        (lambda: Sampling(stop=("END", 3)), "allowed: texts, such as"),
        (lambda: Sampling(stop_token_ids=2), "stop_token_ids is 2; allowed: token ids, such as"),
        (lambda: Sampling(ignore_eos="no"), "ignore_eos is 'no'; allowed: True or False"),
        (lambda: TokenIds(5), r"TokenIds.ids is 5; allowed: token ids, such as \(1, 2, 3\)"),
        (lambda: TokenIds("123"), "TokenIds.ids is '123'; allowed: token ids"),
        (lambda: Message("user", None), "content is None; allowed: a text"),
        (lambda: Request(prompt="x", sampling={"max_tokens": 2}), "sampling is .*; allowed: a Sampling"),
        (lambda: Request(prompt="x", kv=0.3), "kv is 0.3; allowed: a KvChoice"),
        (lambda: Request(prompt="x", request_id=7), "request_id is 7; allowed: a text"),
    ],
)
def test_a_value_of_another_type_is_named_with_what_is_allowed(make, said):
    with pytest.raises(InvalidArgumentError, match=said):
        make()


@pytest.mark.parametrize(
    "prompt",
    [
        [{"role": "user", "content": "hi"}],
        [Message("user", "hi"), "hi"],
        [1, 2, 3],
        Message("user", "hi"),
        b"hi",
        b"",
        None,
        7,
    ],
    ids=repr,
)
def test_a_prompt_of_another_kind_is_told_the_three_that_there_are(prompt):
    with pytest.raises(InvalidArgumentError) as caught:
        Request(prompt=prompt)
    for said in ("the prompt is ", "a text", "TokenIds((1, 2, 3))", 'Message("user", "Hello")'):
        assert said in caught.value.message


def test_lists_and_numbers_of_other_makes_will_do():
    ids = np.asarray([1, 2])
    assert list(Request(prompt=TokenIds(list(ids))).to_proto().token_ids.ids) == [1, 2]
    sampling = Sampling(stop=["a"], temperature=1, max_tokens=ids[1]).to_proto()
    assert (list(sampling.stop), sampling.temperature, sampling.max_tokens) == (["a"], 1.0, 2)
    assert KvChoice(budget=np.float32(0.5)).to_proto().budget == 0.5


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda text: Request(prompt=text), "the prompt"),
        (lambda text: Message("user", text), "content"),
        (lambda text: Request(prompt="x", model=text), "model"),
        (lambda text: Sampling(stop=("fine", text)), "stop"),
        (lambda text: KvChoice(policy=text), "policy"),
    ],
)
def test_a_text_that_is_none_is_refused(make, named):
    with pytest.raises(InvalidArgumentError) as caught:
        make("hi\ud800")
    assert caught.value.message == f"{named} has '\\ud800' at character 2, which is not valid text; give UTF-8"
