import math
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.generation.params import SamplingParams
from spectrumkv.common.generation.structured.form import StructuredOutput
from spectrumkv.v1 import generation_pb2

VALID = st.builds(
    SamplingParams,
    max_tokens=st.integers(2, 2**32 - 1),
    temperature=st.floats(0, 100),
    top_p=st.floats(0, 1, exclude_min=True),
    top_k=st.integers(0, 2**32 - 1),
    repetition_penalty=st.floats(0.01, 100),
    seed=st.none() | st.integers(0, 2**64 - 1),
    stop=st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=256), max_size=16).map(tuple),
    stop_token_ids=st.frozensets(st.integers(0, 2**32 - 1), max_size=20),
    ignore_eos=st.booleans(),
    logprobs=st.none() | st.integers(0, 20),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    min_p=st.floats(0, 1),
    logit_bias=st.dictionaries(st.integers(0, 2**32 - 1), st.floats(-100, 100), max_size=20),
    min_tokens=st.integers(0, 2),
    bad_words=st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=256), max_size=16).map(tuple),
    n=st.integers(1, 64),
    structured_output=st.sampled_from(
        [
            None,
            StructuredOutput("json_object"),
            StructuredOutput("json_schema", "{}"),
            StructuredOutput("regex", "a+"),
            StructuredOutput("grammar", 'start: "a"'),
            StructuredOutput("choice", choices=("yes", "no")),
        ]
    ),
)


@given(VALID)
def test_survives_the_wire(params: SamplingParams) -> None:
    message = generation_pb2.SamplingParams.FromString(params.to_proto().SerializeToString())
    assert SamplingParams.from_proto(message) == params


def test_an_empty_message_takes_every_default() -> None:
    assert SamplingParams.from_proto(generation_pb2.SamplingParams()) == SamplingParams()


def test_zeros_that_are_set_are_not_defaults() -> None:
    message = generation_pb2.SamplingParams(seed=0, logprobs=0, top_k=0, temperature=0)
    assert SamplingParams.from_proto(message) == SamplingParams(seed=0, logprobs=0)


def test_the_message_states_what_its_reader_could_have_another_default_for() -> None:
    message = SamplingParams(logprobs=0).with_seed().to_proto()
    optional = [one.name for one in message.DESCRIPTOR.fields if one.has_presence and one.message_type is None]
    assert len(optional) == 12
    assert all(message.HasField(name) for name in optional)


def test_parameters_and_message_have_the_same_fields() -> None:
    described = generation_pb2.SamplingParams.DESCRIPTOR.fields
    assert {one.name for one in fields(SamplingParams)} == {one.name for one in described}


def test_a_seed_is_kept_or_drawn() -> None:
    assert SamplingParams(seed=0).with_seed().seed == 0
    drawn = {SamplingParams().with_seed().seed for _ in range(20)}
    assert len(drawn) == 20
    assert replace(SamplingParams().with_seed(), seed=None) == SamplingParams()


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("max_tokens", 0, "from 1 to 4294967295"),
        ("max_tokens", -1, "from 1"),
        ("max_tokens", 1.5, "a whole number"),
        ("max_tokens", True, "a whole number"),
        ("max_tokens", 2**32, "to 4294967295"),
        ("temperature", -0.1, "a number from 0 to 100"),
        ("temperature", math.nan, "a number from 0 to 100"),
        ("temperature", math.inf, "a number from 0 to 100"),
        ("temperature", 101, "a number from 0 to 100"),
        ("temperature", "1", "a number from 0 to 100"),
        ("top_p", 0, "greater than 0 and at most 1"),
        ("top_p", -0.5, "a number from 0 to 1"),
        ("top_p", 1.0001, "a number from 0 to 1"),
        ("top_p", math.nan, "a number from 0 to 1"),
        ("top_k", -1, "a whole number from 0"),
        ("top_k", 1.0, "a whole number"),
        ("repetition_penalty", 0, "a number from 0.01 to 100"),
        ("repetition_penalty", -1.1, "a number from 0.01 to 100"),
        ("repetition_penalty", math.inf, "a number from 0.01 to 100"),
        ("repetition_penalty", math.nan, "a number from 0.01 to 100"),
        ("seed", -1, "from 0 to 18446744073709551615"),
        ("seed", 2**64, "from 0 to 18446744073709551615"),
        ("logprobs", 21, "from 0 to 20"),
        ("logprobs", -1, "from 0 to 20"),
        ("stop", "abc", "a tuple of strings"),
        ("stop_token_ids", [1], "a frozenset"),
        ("ignore_eos", 1, "true or false"),
        ("presence_penalty", 2.1, "a number from -2 to 2"),
        ("frequency_penalty", math.nan, "a number from -2 to 2"),
        ("min_p", 1.5, "a number from 0 to 1"),
        ("min_tokens", -1, "a whole number from 0"),
        ("min_tokens", 129, "at most max_tokens, which is 128"),
        ("bad_words", ["a"], "a tuple of strings"),
        ("logit_bias", [(1, 2.0)], "numbers by token id"),
        ("n", 0, "a whole number from 1 to 64"),
        ("n", 65, "a whole number from 1 to 64"),
    ],
)
def test_a_refusal_names_field_value_and_what_is_allowed(field: str, value: Any, allowed: str) -> None:
    with pytest.raises(InvalidArgumentError) as refusal:
        SamplingParams(**{field: value})
    assert refusal.value.message.startswith(f"{field} is {value!r}; allowed: ")
    assert allowed in refusal.value.message


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        (("ok", ""), r"stop\[1\] is ''; allowed: a string of at least one character"),
        (("x" * 257,), r"stop\[0\] has 257 characters; allowed: at most 256"),
        (tuple("abcdefghijklmnopq"), "stop has 17 strings; allowed: at most 16"),
        (("\ud800",), r"stop\[0\] is '\\ud800'; allowed: characters that UTF-8 can encode"),
        ((5,), r"stop\[0\] is 5; allowed"),
    ],
)
def test_stop_strings_are_checked(stop: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        SamplingParams(stop=stop)


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        ({-1: 1.0}, "a token id of logit_bias is -1; allowed: a whole number from 0"),
        ({7: 101.0}, r"logit_bias\[7\] is 101.0; allowed: a number from -100 to 100"),
        (dict.fromkeys(range(1025), 1.0), "logit_bias has 1025 tokens; allowed: at most 1024"),
    ],
)
def test_logit_bias_is_checked(bias: dict[int, float], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        SamplingParams(logit_bias=bias)
    with pytest.raises(
        InvalidArgumentError, match="a token id of logit_bias is 10; allowed: a whole number from 0 to 9"
    ):
        SamplingParams(logit_bias={10: 1.0}).check_vocabulary(10)


def test_each_answer_has_the_parameters_of_a_request_of_its_own() -> None:
    answers = SamplingParams(n=3, seed=2**64 - 2, top_k=5).answers()
    assert answers == tuple(SamplingParams(seed=seed, top_k=5) for seed in (2**64 - 2, 2**64 - 1, 0))


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"form": "xml"}, "structured_output has the form 'xml'; allowed: json_schema"),
        ({"form": "regex"}, "structured_output.regex is empty"),
        ({"form": "choice"}, "structured_output.choice has no texts"),
        ({"form": "choice", "choices": ("a", "")}, "has an empty text"),
        ({"form": "choice", "choices": ("a",) * 1025}, "has 1025 texts; allowed: at most 1024"),
        (
            {"form": "grammar", "text": "x" * 65537},
            "structured_output.grammar has 65537 bytes; allowed: at most 65536",
        ),
    ],
)
def test_forms_of_structured_output_are_bounded(form: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        StructuredOutput(**form)


def test_stop_tokens_are_checked() -> None:
    with pytest.raises(InvalidArgumentError, match="a stop token id is -1; allowed: a whole number from 0"):
        SamplingParams(stop_token_ids=frozenset({-1}))
    with pytest.raises(InvalidArgumentError, match="stop_token_ids has 257 ids; allowed: at most 256"):
        SamplingParams(stop_token_ids=frozenset(range(257)))


def test_a_message_is_checked_like_any_other_source() -> None:
    with pytest.raises(InvalidArgumentError, match="top_p is nan"):
        SamplingParams.from_proto(generation_pb2.SamplingParams(top_p=math.nan))
    with pytest.raises(InvalidArgumentError, match="max_tokens is 0"):
        SamplingParams.from_proto(generation_pb2.SamplingParams(max_tokens=0))


def test_long_lists_of_a_message_are_refused_before_they_are_copied() -> None:
    many = generation_pb2.SamplingParams(stop_token_ids=[7] * 257)
    with pytest.raises(InvalidArgumentError, match="stop_token_ids has 257 ids; allowed: at most 256"):
        SamplingParams.from_proto(many)
    with pytest.raises(InvalidArgumentError, match="stop has 17 strings; allowed: at most 16"):
        SamplingParams.from_proto(generation_pb2.SamplingParams(stop=[""] * 17))


@pytest.mark.parametrize(("room", "expected"), [(500, 128), (128, 128), (92, 92), (1, 1), (0, 1), (-9, 1)])
def test_the_answer_takes_what_room_there_is(room: int, expected: int) -> None:
    assert SamplingParams().with_room(room).max_tokens == expected
