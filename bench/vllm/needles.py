"""Asks a pair of vLLM servers for needles."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spectrumkv.bench.quality.niah import ANSWER_TOKENS
from spectrumkv.bench.report.kept_outcomes import KeptOutcomes, Key
from spectrumkv.bench.vllm.engine import COMPUTED_TOKENS, FETCHED_BYTES, EnginePair, setting_name
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.prefill_server.tuning.needle.prompt import NeedlePrompt


@dataclass(frozen=True)
class Answer:
    """Judges the answer to one question.

    Attributes:
        found: whether it has the needle.
        fetched_bytes: of all messages that brought the prompt's KV.
        computed_tokens: that decode's model computed.
    """

    found: bool
    fetched_bytes: float
    computed_tokens: float


def ask_all(
    pair: EnginePair,
    prompts: Sequence[NeedlePrompt],
    settings: Sequence[Mapping[str, Any]],
    geometry: KvGeometry,
    kept: KeptOutcomes[Answer],
    on_step: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Ask the same questions at every setting.

    Args:
        pair: the servers.
        prompts: the questions.
        settings: `kv_transfer_params` of each setting: "policy", and "budget" where it has one.
        geometry: of their model's KV.
        kept: has the answers that are known, and gets the others.
        on_step: called after each answer with a text that says what was done.

    Returns:
        A row for each setting, in their order.

    Raises:
        SpectrumKVError: a server does not answer, or an answer cannot be kept.
    """
    for number, prompt in enumerate(prompts):
        for params in settings:
            if _key(number, params) not in kept:
                kept.keep(_key(number, params), ask(pair, prompt, params))
            on_step(f"prompt {number}, needle at {prompt.depth:.0%}: {setting_name(params)}")
    return [
        _row(params, prompts, [kept[_key(number, params)] for number in range(len(prompts))], geometry)
        for params in settings
    ]


def ask(pair: EnginePair, prompt: NeedlePrompt, params: Mapping[str, Any]) -> Answer:
    """Ask one question at one setting.

    Args:
        pair: the servers.
        prompt: the question.
        params: `kv_transfer_params` of the setting.

    Returns:
        What was answered, and what it took.

    Raises:
        UnavailableError: a server does not answer, or refuses.
    """
    before = [pair.decode.metric(name) for name in (FETCHED_BYTES, COMPUTED_TOKENS)]
    text = pair.complete(list(prompt.token_ids), ANSWER_TOKENS, **params)
    fetched, computed = (
        pair.decode.metric(name) - at for name, at in zip((FETCHED_BYTES, COMPUTED_TOKENS), before, strict=True)
    )
    return Answer(prompt.is_answered_by(text), fetched, computed)


def _row(
    params: Mapping[str, Any], prompts: Sequence[NeedlePrompt], answers: Sequence[Answer], geometry: KvGeometry
) -> dict[str, Any]:
    fp16 = sum(geometry.fp16_bytes(len(prompt.token_ids)) for prompt in prompts)
    return {
        **params,
        "found": sum(one.found for one in answers),
        "total": len(answers),
        "by_depth": [
            {"depth": prompt.depth, "found": int(one.found)} for prompt, one in zip(prompts, answers, strict=True)
        ],
        "budget_counted": sum(one.fetched_bytes for one in answers) / fp16,
        "tokens_computed": sum(one.computed_tokens for one in answers),
        "prompt_tokens": sum(len(prompt.token_ids) for prompt in prompts),
    }


def _key(number: int, params: Mapping[str, Any]) -> Key:
    return number, str(params["policy"]), float(params.get("budget", 1.0))
