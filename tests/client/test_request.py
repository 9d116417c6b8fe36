import pytest

from spectrumkv.client.request import KvChoice, Message, Request, Sampling, TokenIds
from spectrumkv.common.errors import InvalidArgumentError


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
    )
    kv = KvChoice(budget=0.3, policy="greedy", scorer="attention", codec="absmax", scope="model")
    request = Request(prompt="x", sampling=sampling, kv=kv, model="m", request_id="r")
    message = request.to_proto()
    for choices, sent in ((sampling, message.sampling), (kv, message.kv)):
        for name in choices.__dataclass_fields__:
            value, arrived = getattr(choices, name), getattr(sent, name)
            assert (tuple(arrived) if isinstance(value, tuple) else arrived) == value, name
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
