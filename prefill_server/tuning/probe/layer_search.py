"""Where INT4 is refused: which layers it harms most, and how few of them must do without."""

import logging
from collections.abc import Callable, Sequence
from functools import partial

from spectrumkv.common.kv.allocation import Int4Layers
from spectrumkv.common.kv.codecs.base import Codec
from spectrumkv.prefill_server.tuning.needle.prompt import NeedlePrompt
from spectrumkv.prefill_server.tuning.probe.budget_sweep import int4_trial, int4_trial_without
from spectrumkv.prefill_server.tuning.probe.questions import NeedleQuestion
from spectrumkv.prefill_server.tuning.probe.results import TRIALS_TO_PASS
from spectrumkv.prefill_server.tuning.probe.runner import ProbeRunner

logger = logging.getLogger(__name__)


def find_int4_layers(examination: ProbeRunner, codec: Codec) -> Int4Layers:
    """Return where INT4 may be used by a model that fails the trial with INT4 in all layers.

    The layers that it harms most are sent at INT8, as few as let the trial pass with the others as they were. Each
    prompt has a number of its own from which on its needle is found, so that it runs once; two of three must be.
    """
    layers = examination.loaded.geometry.layers
    most = layers - 1
    if most == 0:
        return Int4Layers.nowhere(layers)
    examination.progress.expect(1 + layers + len(examination.prompts) * (1 + bisection_steps(most)))
    ranking = _most_harmed_first(examination, codec)
    each = [_fewest_that_answer(examination, codec, prompt, ranking) for prompt in examination.prompts]
    enough = sorted(count for count in each if count is not None)[TRIALS_TO_PASS - 1 :]
    return Int4Layers(frozenset(ranking[: enough[0]])) if enough else Int4Layers.nowhere(layers)


def fewest_that_pass(most: int, passes: Callable[[int], bool]) -> int | None:
    """Return the least number from 0 to `most` that passes, by bisection; None where `most` does not pass.

    Args:
        most: 1 or more.
        passes: whether this number does. Where it passes, larger ones should, too.
    """
    if not passes(most):
        return None
    least, passing = 0, most
    while least < passing:
        middle = (least + passing) // 2
        if passes(middle):
            passing = middle
        else:
            least = middle + 1
    return passing


def bisection_steps(most: int) -> int:
    """Return how often `fewest_that_pass` asks at most."""
    return 1 + most.bit_length()


def _most_harmed_first(examination: ProbeRunner, codec: Codec) -> Sequence[int]:
    """The layers by what each does alone: mean KL with it as in the trial and all others exact."""
    question = examination.prose_question(examination.stretches[0])
    exact = question.captured.exact_kv()
    received = examination.call(partial(question.received_kv, int4_trial(codec)))
    damage = []
    for layer, coded in enumerate(received):
        examination.progress.begin(f"prose with INT4 in layer {layer} only")
        kv = [*exact[:layer], coded, *exact[layer + 1 :]]
        damage.append(examination.call(partial(question.distance, kv)).kl / question.predictions)
    ranking = sorted(range(len(damage)), key=lambda layer: damage[layer], reverse=True)
    shown = ", ".join(f"{layer} ({damage[layer]:.2g})" for layer in ranking[:8])
    logger.info("probe: INT4 harms these layers most, in nats a token: %s", shown)
    return ranking


def _fewest_that_answer(
    examination: ProbeRunner, codec: Codec, prompt: NeedlePrompt, ranking: Sequence[int]
) -> int | None:
    """How many layers, the first of `ranking`, must do without INT4 for this needle to be found."""
    depth = f"{prompt.depth:.0%}"
    examination.progress.begin(f"the prompt with its needle at {depth} again")
    question = examination.call(partial(NeedleQuestion.put, examination.loaded, prompt))

    def answers(count: int) -> bool:
        examination.progress.begin(f"needle at {depth}, {count} layers without INT4")
        plan = int4_trial_without(codec, frozenset(ranking[:count]), len(ranking))
        return prompt.is_answered_by(examination.call(partial(question.answer_under, plan)))

    fewest = fewest_that_pass(len(ranking) - 1, answers)
    if fewest is None:
        logger.info("probe: the needle at %s is lost even with INT4 in one layer only", depth)
    else:
        logger.info("probe: the needle at %s is found with %d layers without INT4", depth, fewest)
    return fewest
