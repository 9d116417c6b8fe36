"""Puts the probe's questions to the model under each setting, one prompt after another."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from spectrumkv.common.model.load import LoadedModel
from spectrumkv.prefill_server.engine.engine import PrefillEngine
from spectrumkv.prefill_server.transfer.plan import KvPlan
from spectrumkv.prefill_server.tuning.divergence import Distance, mean_kl, ppl_delta_pct
from spectrumkv.prefill_server.tuning.needle.prompt import NeedlePrompt
from spectrumkv.prefill_server.tuning.probe.questions import (
    NeedleQuestion,
    ProseQuestion,
    Stretch,
    needle_prompts,
    prose_stretches,
)
from spectrumkv.prefill_server.verdict import ProbedSetting, ProbeTrial

T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProbeStep:
    """Names what the probe is about to do.

    Attributes:
        number: from 1.
        total: steps of the whole probe. It grows where the search for layers follows, which may end early.
        doing: in words.
    """

    number: int
    total: int
    doing: str

    def __str__(self) -> str:
        return f"probe, step {self.number} of {self.total}: {self.doing}"


OnProgress = Callable[[ProbeStep], object]


class ProbeProgress:
    """Counts the steps of a probe and announces each one.

    Args:
        on_progress: called with each step before it begins.
    """

    def __init__(self, on_progress: OnProgress) -> None:
        self._total = 0
        self._on_progress = on_progress
        self._number = 0

    def expect(self, steps: int) -> None:
        """Add steps that will be needed."""
        self._total += steps

    def begin(self, doing: str) -> None:
        """Announce the next step."""
        self._number += 1
        self._on_progress(ProbeStep(self._number, self._total, doing))


@dataclass(frozen=True)
class NeedleAnswers:
    """Holds what the model answers to one prompt.

    Attributes:
        prompt: with the needle.
        found_fp16: whether the model finds the needle over the exact KV.
        over_received: the answer over the KV of each setting, in the order of the settings.
    """

    prompt: NeedlePrompt
    found_fp16: bool
    over_received: Sequence[str]

    def found(self, index: int) -> bool:
        """Return whether the needle is found under setting number `index`."""
        return self.prompt.is_answered_by(self.over_received[index])

    def trial(self, index: int) -> ProbeTrial:
        """Return the outcome under setting number `index`."""
        length, depth = len(self.prompt.token_ids), self.prompt.depth
        return ProbeTrial(length, depth, self.found(index), self.found_fp16, self.over_received[index])


@dataclass(frozen=True)
class ProseDistances:
    """Holds how far the model's predictions of one stretch of prose move.

    Attributes:
        predictions: how many tokens are predicted.
        by_setting: distance of the predictions over the KV of each setting, in the order of the settings.
    """

    predictions: int
    by_setting: Sequence[Distance]


@dataclass(frozen=True)
class ProbeRunner:
    """Runs each prompt of the probe once, and lets go of its KV before the next one runs.

    Attributes:
        loaded: the model.
        engine: runs the model; requests that come meanwhile take turns with the probe's steps.
        progress: announces each step.
        prompts: with needles.
        stretches: of prose.
    """

    loaded: LoadedModel
    engine: PrefillEngine
    progress: ProbeProgress
    prompts: Sequence[NeedlePrompt]
    stretches: Sequence[Stretch]

    @classmethod
    def of(cls, loaded: LoadedModel, engine: PrefillEngine, progress: ProbeProgress) -> "ProbeRunner":
        """Return a runner with the usual prompts and prose.

        Raises:
            FailedPreconditionError: the model's context is too short.
        """
        return cls(loaded, engine, progress, needle_prompts(loaded), prose_stretches(loaded))

    def measure(self, plans: Sequence[KvPlan]) -> tuple[list[ProbeTrial], list[ProbedSetting]]:
        """Ask for each needle, and have each stretch of prose predicted, over the KV of each setting.

        Args:
            plans: the settings, at least one.

        Returns:
            The trials of the first setting, one for each needle, and the results of all settings.
        """
        self.progress.expect((len(self.prompts) + len(self.stretches)) * (1 + len(plans)))
        answers = [self._ask(prompt, plans) for prompt in self.prompts]
        distances = [self._predict(stretch, plans) for stretch in self.stretches]
        settings = [_probed_setting(plan, index, answers, distances) for index, plan in enumerate(plans)]
        return [one.trial(0) for one in answers], settings

    def prose_question(self, stretch: Stretch) -> ProseQuestion:
        """Run a stretch's context, as a step of its own.

        Returns:
            The question, with the predictions over the exact KV.
        """
        self.progress.begin(f"{len(stretch.context)} tokens of prose, and {len(stretch.scored)} more to predict")
        return self.call(partial(ProseQuestion.put, self.loaded, stretch))

    def call(self, call: Callable[[], T]) -> T:
        """Return what a call on the engine's thread returns."""
        return self.engine.submit_call(call).result()

    def _ask(self, prompt: NeedlePrompt, plans: Sequence[KvPlan]) -> NeedleAnswers:
        depth = f"{prompt.depth:.0%}"
        self.progress.begin(f"a prompt of {len(prompt.token_ids)} tokens, its needle at {depth}")
        question = self.call(partial(NeedleQuestion.put, self.loaded, prompt))
        over_received = []
        for plan in plans:
            self.progress.begin(f"needle at {depth}, {plan_name(plan)}")
            over_received.append(self.call(partial(question.answer_under, plan)))
        logger.info(
            "probe: the needle at %s is %s; the model %s it over exact KV and answers %s",
            depth, prompt.fact.answer, "finds" if question.found_fp16 else "does not find", over_received,
        )  # fmt: skip
        return NeedleAnswers(prompt, question.found_fp16, over_received)

    def _predict(self, stretch: Stretch, plans: Sequence[KvPlan]) -> ProseDistances:
        question = self.prose_question(stretch)
        distances = []
        for plan in plans:
            self.progress.begin(f"prose, {plan_name(plan)}")
            distances.append(self.call(partial(question.distance_under, plan)))
        return ProseDistances(question.predictions, distances)


def plan_name(plan: KvPlan) -> str:
    """Return a setting's name for people: "greedy by absmax at 0.3"."""
    written_by = "" if plan.codec.name == plan.policy.name else f" by {plan.codec.name}"
    return f"{plan.policy.name}{written_by} at {plan.budget.value:g}"


def _probed_setting(
    plan: KvPlan, index: int, answers: Sequence[NeedleAnswers], prose: Sequence[ProseDistances]
) -> ProbedSetting:
    """Return the results of setting number `index`, and log them."""
    findable = [one for one in answers if one.found_fp16]
    distances = [one.by_setting[index] for one in prose]
    predictions = sum(one.predictions for one in prose)
    setting = ProbedSetting(
        policy=plan.policy.name,
        codec=plan.codec.name,
        budget=plan.budget.value,
        found_fp16=len(findable),
        found=sum(one.found(index) for one in findable),
        kl=mean_kl(distances, predictions),
        ppl_delta_pct=ppl_delta_pct(distances, predictions),
    )
    logger.info(
        "probe: with %s the model finds %d of %d needles, at a KL of %.2g nats a token: %s",
        plan_name(plan), setting.found, setting.found_fp16, setting.kl, "safe" if setting.safe else "not safe",
    )  # fmt: skip
    return setting
