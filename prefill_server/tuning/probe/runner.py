"""Puts the questions to the model under each setting, one prompt after another."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from spectrumkv.common.model.load import LoadedModel
from spectrumkv.prefill_server.engine.engine import PrefillEngine
from spectrumkv.prefill_server.transfer.plan import KvPlan
from spectrumkv.prefill_server.tuning.divergence import Distance
from spectrumkv.prefill_server.tuning.needle.prompt import NeedlePrompt
from spectrumkv.prefill_server.tuning.probe.budget_sweep import plan_name
from spectrumkv.prefill_server.tuning.probe.progress import ProbeProgress
from spectrumkv.prefill_server.tuning.probe.questions import (
    NeedleQuestion,
    ProseQuestion,
    Stretch,
    mean_kl,
    needle_prompts,
    ppl_delta_pct,
    prose_stretches,
)
from spectrumkv.prefill_server.tuning.probe.results import ProbedSetting, ProbeTrial

T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass
class Answers:
    """What the model answers to one prompt.

    Attributes:
        prompt: with the needle.
        found_fp16: whether it is found over the exact KV.
        over_received: the answer over the KV of each setting.
    """

    prompt: NeedlePrompt
    found_fp16: bool
    over_received: list[str] = field(default_factory=list)

    def found(self, rung: int) -> bool:
        """Whether the needle is found under setting number `rung`."""
        return self.prompt.is_answered_by(self.over_received[rung])

    def trial(self, rung: int) -> ProbeTrial:
        """Return what setting number `rung` came to."""
        length, depth = len(self.prompt.token_ids), self.prompt.depth
        return ProbeTrial(length, depth, self.found(rung), self.found_fp16, self.over_received[rung])


@dataclass
class Readings:
    """What the model predicts of one stretch of prose.

    Attributes:
        predictions: how many tokens.
        distances: of the predictions over the KV of each setting.
    """

    predictions: int
    distances: list[Distance] = field(default_factory=list)


@dataclass(frozen=True)
class ProbeRunner:
    """One model's; each prompt runs once, and its KV is let go before the next runs.

    Attributes:
        loaded: the model.
        engine: runs it; requests that come meanwhile take turns with the steps.
        progress: told of each step.
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
        """Prepare the usual questions.

        Raises:
            FailedPreconditionError: the model's context is too short.
        """
        return cls(loaded, engine, progress, needle_prompts(loaded), prose_stretches(loaded))

    def hold(self, plans: Sequence[KvPlan]) -> tuple[list[Answers], list[Readings]]:
        """Ask for each needle, and have each stretch of prose predicted, over the KV of each setting."""
        self.progress.expect((len(self.prompts) + len(self.stretches)) * (1 + len(plans)))
        answers = [self._ask(prompt, plans) for prompt in self.prompts]
        return answers, [self._read(stretch, plans) for stretch in self.stretches]

    def _ask(self, prompt: NeedlePrompt, plans: Sequence[KvPlan]) -> Answers:
        depth = f"{prompt.depth:.0%}"
        self.progress.begin(f"a prompt of {len(prompt.token_ids)} tokens, its needle at {depth}")
        question = self.call(partial(NeedleQuestion.put, self.loaded, prompt))
        answers = Answers(prompt, question.found_fp16)
        for plan in plans:
            self.progress.begin(f"needle at {depth}, {plan_name(plan)}")
            answers.over_received.append(self.call(partial(question.answer_under, plan)))
        logger.info(
            "probe: the needle at %s is %s; the model %s it over exact KV and answers %s",
            depth, prompt.fact.answer, "finds" if answers.found_fp16 else "does not find", answers.over_received,
        )  # fmt: skip
        return answers

    def _read(self, stretch: Stretch, plans: Sequence[KvPlan]) -> Readings:
        question = self.prose_question(stretch)
        readings = Readings(question.predictions)
        for plan in plans:
            self.progress.begin(f"prose, {plan_name(plan)}")
            readings.distances.append(self.call(partial(question.distance_under, plan)))
        return readings

    def prose_question(self, stretch: Stretch) -> ProseQuestion:
        """Run a stretch's context; a step of its own."""
        self.progress.begin(f"{len(stretch.context)} tokens of prose, and {len(stretch.scored)} more to predict")
        return self.call(partial(ProseQuestion.put, self.loaded, stretch))

    def call(self, call: Callable[[], T]) -> T:
        """Run something on the engine's thread."""
        return self.engine.submit_call(call).result()


def probed_setting(
    plan: KvPlan, rung: int, answers: Sequence[Answers], readings: Sequence[Readings]
) -> ProbedSetting:
    """Put together what was found of setting number `rung`."""
    findable = [one for one in answers if one.found_fp16]
    distances = [one.distances[rung] for one in readings]
    predictions = sum(one.predictions for one in readings)
    setting = ProbedSetting(
        policy=plan.policy.name,
        codec=plan.codec.name,
        budget=plan.budget,
        found_fp16=len(findable),
        found=sum(one.found(rung) for one in findable),
        kl=mean_kl(distances, predictions),
        ppl_delta_pct=ppl_delta_pct(distances, predictions),
    )
    logger.info(
        "probe: %s finds %d of %d needles, KL %.2g nats a token: %s",
        plan_name(plan), setting.found, setting.found_fp16, setting.kl, "safe" if setting.safe else "not safe",
    )  # fmt: skip
    return setting
