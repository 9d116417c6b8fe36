"""Answers held to a form: token 1 by prefill, the others by decode."""

import json
import random
import re
import time

import pytest

from spectrumkv.client.request import KvChoice, Message, Sampling
from spectrumkv.client.structured_output import StructuredOutput
from spectrumkv.common.errors import InvalidArgumentError
from tests.services.generation.schemas import random_schema, violations
from tests.services.generation.test_generation import complete, prompt
from tests.services.pair import Pair, running_pair

PERSON = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)
QUESTIONS = (
    "Describe a person.",
    "Invent something.",
    "What is the capital of France?",
    "Answer with anything you like, at length.",
)
# How many answers the slow test asks for, and the exhaustive one.
SCHEMAS, MANY_SCHEMAS = 8, 200


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_each_form_holds_from_the_first_token_on(llama_pair: Pair, temperature: float) -> None:
    drawn = {"temperature": temperature, "seed": 3, "max_tokens": 150}
    form = StructuredOutput(json_schema=PERSON)
    answer = complete(llama_pair, prompt(), structured_output=form, **drawn)
    assert answer.finish_reason == "stop"
    assert violations(json.loads(PERSON), answer.text) == []
    answer = complete(llama_pair, prompt(), structured_output=StructuredOutput(regex="[A-Z]{2}[0-9]{5}"), **drawn)
    assert re.fullmatch("[A-Z]{2}[0-9]{5}", answer.text)
    answer = complete(llama_pair, prompt(), structured_output=StructuredOutput(choice=("blue", "green")), **drawn)
    assert answer.text in ("blue", "green")


def test_several_answers_are_held_to_the_form_each(llama_pair: Pair) -> None:
    form = StructuredOutput(json_schema=PERSON)
    answers = complete(
        llama_pair, prompt(), structured_output=form, n=4, temperature=1.0, seed=1, max_tokens=150
    ).answers
    assert [violations(json.loads(PERSON), answer.text) for answer in answers] == [[]] * 4


def test_a_form_that_cannot_be_used_is_refused_before_the_prompt_runs(llama_pair: Pair) -> None:
    for form, said in (
        (StructuredOutput(regex="(a"), "structured_output.regex cannot be used"),
        (StructuredOutput(json_schema="no"), "structured_output.json_schema is no JSON"),
        (StructuredOutput(grammar="x" * 70000), "structured_output.grammar has 70000 bytes"),
    ):
        with pytest.raises(InvalidArgumentError, match=said):
            complete(llama_pair, prompt(), structured_output=form)


def test_a_form_that_would_overflow_the_stack_ends_its_request_alone(llama_pair: Pair) -> None:
    grammar = "start: r0\n" + "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(3000)) + '\nr3000: "a"'
    with pytest.raises(InvalidArgumentError, match="nested too deeply"):
        complete(llama_pair, prompt(), structured_output=StructuredOutput(grammar=grammar))
    answer = complete(llama_pair, prompt(), structured_output=StructuredOutput(choice=("blue",)))
    assert answer.text == "blue"


def hold_to_random_schemas(count: int) -> tuple[float, float]:
    """Ask the default model for answers to random schemas; return median seconds a token with and without a form."""
    held, free = [], []
    with running_pair(None) as pair, pair.client() as client:
        # Both services make their view of the tokenizer for the first form.
        first = Sampling(max_tokens=1, structured_output=StructuredOutput(json_object=True))
        client.generate("x", sampling=first).result()
        for seed in range(count):
            schema = random_schema(random.Random(seed))
            asked = [Message("user", QUESTIONS[seed % len(QUESTIONS)])]
            drawn = {"temperature": 0.8 * (seed % 2), "seed": seed, "max_tokens": 600}
            form = StructuredOutput(json_schema=json.dumps(schema))
            started = time.perf_counter()
            sampling = Sampling(structured_output=form, **drawn)
            answer = client.generate(asked, sampling=sampling, kv=KvChoice()).result()
            held.append((time.perf_counter() - started) / len(answer.tokens))
            assert answer.finish_reason == "stop", (schema, answer.text)
            assert violations(schema, answer.text) == [], (schema, answer.text)
            # As many tokens without a form, right after.
            plain = Sampling(**{**drawn, "max_tokens": len(answer.tokens)}, ignore_eos=True)
            started = time.perf_counter()
            answer = client.generate(asked, sampling=plain, kv=KvChoice()).result()
            free.append((time.perf_counter() - started) / len(answer.tokens))
    held.sort()
    free.sort()
    return held[count // 2], free[count // 2]


@pytest.mark.slow
def test_random_schemas_are_held_to() -> None:
    hold_to_random_schemas(SCHEMAS)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_many_random_schemas_are_held_to_at_no_more_than_twice_the_time() -> None:
    held, free = hold_to_random_schemas(MANY_SCHEMAS)
    assert held < 2 * free, f"{1000 * held:.1f} ms a token held to a form, {1000 * free:.1f} ms without"
