"""Ask for a needle in a haystack as the services run: prefill exactly, receive the KV, answer greedily over it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from spectrumkv.bench.methods.method import ExactFp16, Method, Prompt, describe
from spectrumkv.bench.methods.served_model import ServedModel
from spectrumkv.bench.quality.measure import OnStep
from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.prefill_server.tuning.needle.prompt import NeedlePrompt, needle_prompt

ANSWER_TOKENS = 16
# Once the text has a number and what ends it, more tokens cannot change the verdict.
_WHOLE_NUMBER = re.compile(r"\d[\d,]*[^\d,]")


@dataclass(frozen=True)
class Outcome:
    """Judge one method's answer to one question.

    Attributes:
        depth: depth of the needle, from 0 to 1.
        found: whether the answer has the needle.
        found_fp16: whether the answer over exact FP16 KV has it.
        counted: counted bytes.
        fp16: bytes of the same KV at FP16.
        budget_nominal: the paper's mean cost per token.
    """

    depth: float
    found: bool
    found_fp16: bool
    counted: float
    fp16: int
    budget_nominal: float


def needle_prompts(
    tokenizer: PreTrainedTokenizerFast, context: int, depths: int, needles: int, question: str
) -> list[NeedlePrompt]:
    """Return `needles` prompts for each of `depths` depths, evenly spaced between the ends; all prompts differ.

    Args:
        tokenizer: the model's tokenizer.
        context: tokens of prompt and question.
        depths: number of depths.
        needles: number of needles at each depth.
        question: "prompt" or "late": whether the question is in the prompt or follows it.

    Raises:
        InvalidArgumentError: a number is out of its range, or the haystack does not fit the context.
    """
    for name, value in (("depths", depths), ("needles", needles)):
        if value < 1:
            raise InvalidArgumentError(f"--{name} is {value}; allowed: 1 or more")
    return [
        needle_prompt(tokenizer, context, (place + 1) / (depths + 1), place * needles + one, question)
        for place in range(depths)
        for one in range(needles)
    ]


def measure(
    served: ServedModel, prompts: Sequence[NeedlePrompt], methods: Sequence[Method], on_step: OnStep
) -> list[dict[str, Any]]:
    """Ask the same questions over every method's KV; each prompt is prefilled exactly and once.

    Args:
        served: the model.
        prompts: the prompts.
        methods: the methods.
        on_step: called after each step with a text that says what was done.

    Returns:
        A row for each method, in their order.

    Raises:
        SpectrumKVError: a method cannot send the KV.
    """
    outcomes: list[list[Outcome]] = [[] for _ in methods]
    for number, needle in enumerate(prompts):
        for mine, outcome in zip(outcomes, ask(served, number, needle, methods, on_step), strict=True):
            mine.append(outcome)
    return [row(method, mine) for method, mine in zip(methods, outcomes, strict=True)]


def ask(
    served: ServedModel, number: int, needle: NeedlePrompt, methods: Sequence[Method], on_step: OnStep
) -> list[Outcome]:
    """Return what each method's KV made of one question; see `measure`."""
    name = f"prompt {number}, needle at {needle.depth:.0%}"
    prompt = served.prefill(needle.token_ids)
    on_step(f"{name}: prefill")
    found_fp16, fp16, _ = _find(served, prompt, needle, ExactFp16())
    on_step(f"{name}: exact FP16 KV")
    outcomes = []
    for method in methods:
        found, counted, nominal = _find(served, prompt, needle, method)
        outcomes.append(Outcome(needle.depth, found, found_fp16, counted, int(fp16), nominal))
        on_step(f"{name}: {describe(method)}")
    return outcomes


def _find(served: ServedModel, prompt: Prompt, needle: NeedlePrompt, method: Method) -> tuple[bool, float, float]:
    """Return whether the needle is found, the counted bytes, and the tier budget."""
    with served.receive(method, prompt) as (context, sent):
        first = prompt.captured.first_token
        if needle.question_ids:
            first = int(served.extend(context, needle.question_ids)[-1].argmax())
        tokens: list[int] = []
        text = ""
        for token in served.generate(context, first, ANSWER_TOKENS):
            tokens.append(token)
            text = served.loaded.tokenizer.decode(tokens, skip_special_tokens=True)
            if _WHOLE_NUMBER.search(text):
                break
    return needle.is_answered_by(text), sent.counted, sent.budget_nominal


def row(method: Method, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return a method's row, whose keys are stable."""
    return {
        "policy": method.policy,
        "codec": method.codec,
        "budget_target": method.budget,
        "budget_counted": sum(one.counted for one in outcomes) / sum(one.fp16 for one in outcomes),
        "found": sum(one.found for one in outcomes),
        "total": len(outcomes),
        "found_fp16": sum(one.found_fp16 for one in outcomes),
        "by_depth": [_at_depth(depth, outcomes) for depth in sorted({one.depth for one in outcomes})],
        "budget_nominal": sum(one.budget_nominal for one in outcomes) / len(outcomes),
        "scorer": method.scorer,
        "scope": method.scope,
    }


def _at_depth(depth: float, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    here = [one for one in outcomes if one.depth == depth]
    return {
        "depth": depth,
        "found": sum(one.found for one in here),
        "total": len(here),
        "found_fp16": sum(one.found_fp16 for one in here),
    }
