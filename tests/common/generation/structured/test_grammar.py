"""Forms of structured output: what is held to, what is refused, and what refusing takes."""

import contextlib
import gc
import json
import re
import time
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.generation.params import SamplingParams
from spectrumkv.common.generation.sampling import Sampler
from spectrumkv.common.generation.structured.form import StructuredOutput
from spectrumkv.common.generation.structured.grammar import COMPILED_FORMS, _literal
from spectrumkv.common.generation.structured.trial import FormTrial
from spectrumkv.common.generation.vocabulary import Vocabulary

WRITTEN = st.characters(codec="utf-8", categories=("L", "N", "P", "S"), include_characters=" \n")
# Far above what was measured, 0.2 s: machines that run tests stall.
SECONDS = 5


def written(vocabulary: Vocabulary, form: StructuredOutput, seed: int, tokens: int = 200) -> str | None:
    """A text of random tokens that is held to the form; None where it is not complete after `tokens`."""
    params = SamplingParams(max_tokens=tokens, temperature=1.0, seed=seed, structured_output=form)
    sampler = Sampler(params, (), vocabulary)
    logits = torch.randn(vocabulary.size, generator=torch.Generator().manual_seed(seed))
    # Texts of random tokens hardly ever end by themselves.
    logits[sorted(vocabulary.eos_token_ids)] = 8.0
    ids: list[int] = []
    for index in range(tokens):
        token_id = sampler.sample(logits, index).token_id
        if token_id in vocabulary.eos_token_ids:
            return vocabulary.tokenizer.decode(ids)
        ids.append(token_id)
    return None


SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 150}, "kind": {"enum": ["cat", "dog"]}},
    "required": ["age", "kind"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(5))
def test_a_json_schema_is_held_to(vocabulary: Vocabulary, seed: int) -> None:
    text = written(vocabulary, StructuredOutput("json_schema", json.dumps(SCHEMA)), seed)
    assert text is not None
    answer = json.loads(text)
    assert list(answer) == ["age", "kind"]
    assert 0 <= answer["age"] <= 150
    assert answer["kind"] in ("cat", "dog")


@pytest.mark.parametrize("seed", range(5))
def test_other_forms_are_held_to(vocabulary: Vocabulary, seed: int) -> None:
    text = written(vocabulary, StructuredOutput("regex", r"[a-f]{3}-\d{1,4}"), seed)
    assert text is not None
    assert re.fullmatch(r"[a-f]{3}-\d{1,4}", text)
    choices = ("yes", "no", "per.haps (not)")
    assert written(vocabulary, StructuredOutput("choice", choices=choices), seed) in choices
    grammar = StructuredOutput("grammar", 'start: "sum: " NUMBER ("+" NUMBER)~2\nNUMBER: /[0-9]{1,3}/')
    text = written(vocabulary, grammar, seed)
    assert text is not None
    assert re.fullmatch(r"sum: \d{1,3}(\+\d{1,3}){2}", text)
    text = written(vocabulary, StructuredOutput("json_object"), seed)
    assert text is None or isinstance(json.loads(text), dict)


@given(choices=st.lists(st.text(WRITTEN, min_size=1, max_size=20), min_size=1, max_size=4))
def test_choices_are_literal_whatever_their_characters(vocabulary: Vocabulary, choices: list[str]) -> None:
    form = StructuredOutput("choice", choices=tuple(choices))
    tokenizer = vocabulary.tokenizer
    if any(tokenizer.decode(tokenizer.encode(one, add_special_tokens=False)) != one for one in choices):
        return  # The model has no tokens for some bytes.
    matcher = vocabulary.grammars.matcher(form)
    ids: Sequence[int] = tokenizer.encode(choices[-1], add_special_tokens=False)
    if not set(ids) & set(tokenizer.all_special_ids):
        assert matcher.consume_tokens(list(ids)), _literal(choices[-1])
        assert matcher.is_accepting()


def test_decode_goes_on_where_prefill_stopped(vocabulary: Vocabulary) -> None:
    form = StructuredOutput("json_schema", json.dumps(SCHEMA))
    params = SamplingParams(temperature=1.0, seed=4, structured_output=form)
    logits = torch.randn(20, vocabulary.size, generator=torch.Generator().manual_seed(1))
    alone = Sampler(params, (), vocabulary)
    expected = [alone.sample(row, index).token_id for index, row in enumerate(logits)]
    decode = Sampler(params, (), vocabulary)
    decode.observe(expected[0])
    assert [decode.sample(row, index).token_id for index, row in enumerate(logits[1:], 1)] == expected[1:]


def test_after_the_form_only_the_end_comes(vocabulary: Vocabulary) -> None:
    form = StructuredOutput("choice", choices=("yes",))
    sampler = Sampler(SamplingParams(structured_output=form, ignore_eos=True), (), vocabulary)
    ids = [sampler.sample(torch.zeros(vocabulary.size), index).token_id for index in range(8)]
    end = next(place for place, one in enumerate(ids) if one in vocabulary.eos_token_ids)
    assert vocabulary.tokenizer.decode(ids[:end]) == "yes"
    assert set(ids[end:]) == vocabulary.eos_token_ids


def nested(depth: int) -> str:
    return '{"type":"object","properties":{"a":' * depth + '{"type":"string"}' + '},"required":["a"]}' * depth


@pytest.mark.parametrize(
    ("form", "text", "said"),
    [
        ("json_schema", "{", "structured_output.json_schema is no JSON"),
        ("json_schema", "[1]", "structured_output.json_schema is '\\[1\\]'; allowed: a JSON object"),
        ("json_schema", nested(1000), "no JSON: maximum recursion"),
        ("json_schema", "[" * 60000, "no JSON: maximum recursion"),
        ("json_schema", '{"type": "nope"}', "cannot be used: Invalid type: nope"),
        ("json_schema", '{"type": "integer", "minimum": 5, "maximum": 3}', "Unsatisfiable schema"),
        ("json_schema", '{"$ref": "http://127.0.0.1/schema"}', "not present in a registry"),
        ("regex", "(a", "structured_output.regex cannot be used: .*unclosed group"),
        ("grammar", "start: nowhere", "structured_output.grammar cannot be used"),
    ],
)
def test_what_cannot_be_used_is_refused_in_time(vocabulary: Vocabulary, form: str, text: str, said: str) -> None:
    grammars = vocabulary.grammars
    started = time.monotonic()
    with pytest.raises(InvalidArgumentError, match=said):
        grammars.matcher(StructuredOutput(form, text))
    assert time.monotonic() - started < SECONDS


def chain(rules: int, rule: str) -> str:
    """A grammar of many rules, of which each names the next one."""
    names = [f"{rule}{number}" for number in range(rules)]
    chained = (f"{name}: {following} {following}" for name, following in pairwise(names))
    return "\n".join((f"start: {names[0]}", *chained, f'{names[-1]}: "a"'))


@pytest.mark.parametrize(
    ("form", "text", "said"),
    [
        ("grammar", chain(3000, "r"), "nested too deeply"),
        ("grammar", chain(2500, "T"), "nested too deeply"),
        ("json_schema", '{"type": "integer", "minimum": ' + "9" * 400 + "}", "not JSON serializable"),
        ("json_schema", '{"const": "\\ud800"}', "not JSON serializable"),
    ],
    ids=["rules", "terminals", "number", "half"],
)
def test_what_would_end_the_process_or_take_minutes_is_refused(
    vocabulary: Vocabulary, form: str, text: str, said: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=said):
        vocabulary.grammars.matcher(StructuredOutput(form, text))
    assert vocabulary.grammars.matcher(StructuredOutput("regex", "still-[a-z]"))


def test_a_form_has_a_limit_of_time_of_its_own(vocabulary: Vocabulary) -> None:
    trial = FormTrial(vocabulary.tokenizer, vocabulary.size, None, cpu_seconds=0.02)
    large = StructuredOutput("json_schema", json.dumps({"required": [f"k{i}" for i in range(6000)]}))
    assert "more than 0.02 s of a processor" in trial.refusal(large)
    assert trial.refusal(StructuredOutput("choice", choices=("yes",))) == ""


def test_a_helper_that_was_killed_is_started_anew(vocabulary: Vocabulary) -> None:
    trial = FormTrial(vocabulary.tokenizer, vocabulary.size, None)
    form = StructuredOutput("regex", "a+")
    assert trial.refusal(form) == ""
    helper = trial._helper
    assert helper is not None
    helper.kill()
    helper.wait()
    assert trial.refusal(form) == ""
    assert trial._helper is not helper
    # Nobody can hold it any more, so that it ends.
    following = trial._helper
    assert following is not None
    del trial
    gc.collect()
    assert following.returncode is not None


HOSTILE = {
    "repeats": ("regex", "((((a{1,100}){1,100}){1,100}){1,100})"),
    "many states": ("regex", ".*a.{18}b"),
    "many dots": ("regex", "(.*a){500}"),
    "long string": ("json_schema", '{"type": "string", "minLength": 50000}'),
    "long array": ("json_schema", '{"type": "array", "items": {"type": "string"}, "minItems": 20000}'),
    "deep": ("json_schema", nested(60)),
    "patterns": (
        "json_schema",
        json.dumps({"properties": {f"k{i}": {"type": "string", "pattern": f"^a{{1,{i}}}b*$"} for i in range(500)}}),
    ),
    "alternatives": (
        "json_schema",
        json.dumps(
            {"anyOf": [{"type": "object", "properties": {f"k{i}{j}": {} for j in range(9)}} for i in range(99)]}
        ),
    ),
    "ambiguous": ("grammar", 'start: start start | "a" | start start start'),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_hard_to_hold_to_ends_in_time(vocabulary: Vocabulary, name: str) -> None:
    form = StructuredOutput(*HOSTILE[name])
    grammars = vocabulary.grammars
    started = time.monotonic()
    with contextlib.suppress(InvalidArgumentError):
        grammars.matcher(form)
        written(vocabulary, form, seed=1, tokens=40)
    assert time.monotonic() - started < SECONDS


def test_a_form_is_compiled_once_and_few_are_kept(vocabulary: Vocabulary) -> None:
    grammars = vocabulary.grammars
    for number in range(COMPILED_FORMS + 8):
        grammars.matcher(StructuredOutput("regex", f"a{{{number + 1}}}"))
    assert len(grammars._compiled) == COMPILED_FORMS
    form = StructuredOutput("regex", f"a{{{COMPILED_FORMS + 8}}}")
    known = grammars._compiled[form]
    mine, other = grammars.matcher(form), grammars.matcher(form)
    assert grammars._compiled[form] is known
    (token_id,) = vocabulary.tokenizer.encode("a", add_special_tokens=False)
    assert mine.consume_token(token_id)
    assert other.compute_bitmask() == known.deep_copy().compute_bitmask()
