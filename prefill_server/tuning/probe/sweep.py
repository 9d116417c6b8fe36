"""Names the settings that the probe tries: a sweep of budgets, and INT4 in some layers only where INT4 is refused."""

import logging
from collections.abc import Callable, Sequence
from functools import partial

from spectrumkv.common.kv.allocation import Int4Layers
from spectrumkv.common.kv.codecs.base import Codec
from spectrumkv.common.kv.codecs.basis import Basis
from spectrumkv.common.kv.codecs.spectral.codec import SpectralCodec
from spectrumkv.common.kv.policies import policies
from spectrumkv.common.kv.tiers import Tier
from spectrumkv.prefill_server.transfer.plan import KvPlan
from spectrumkv.prefill_server.tuning.needle.prompt import NeedlePrompt
from spectrumkv.prefill_server.tuning.probe.questions import NeedleQuestion
from spectrumkv.prefill_server.tuning.probe.runner import ProbeRunner
from spectrumkv.prefill_server.verdict import TRIALS_TO_PASS, UNPROBED_BUDGET

logger = logging.getLogger(__name__)

COUNTED_BUDGETS = (0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1)


def budget_sweep(codec: Codec, counted: Codec, basis: Basis) -> list[KvPlan]:
    """Return the settings that every probe tries.

    Args:
        codec: writes the trial of INT4.
        counted: writes the counted budgets of policy "spectral".
        basis: of the model.

    Returns:
        The trial of INT4, and after it the counted budgets.
    """
    budgets = [_plan(SpectralCodec.name, budget, counted, Int4Layers(), basis) for budget in COUNTED_BUDGETS]
    return [int4_trial(codec), *budgets]


def int4_trial(codec: Codec) -> KvPlan:
    """Return the paper's trial of INT4: three tiers by Greedy at 0.3 (SpectrumKV, arXiv 2606.08635, INT4 probe)."""
    return _plan("greedy", UNPROBED_BUDGET, codec, Int4Layers(), None)


def int4_trial_without(codec: Codec, off: frozenset[int], layers: int) -> KvPlan:
    """Return the trial with INT8 in some layers, which shows what INT4 does in the others.

    Args:
        codec: writes the tiers.
        off: layers that get INT8. The budget is larger by what that costs.
        layers: how many layers the model has.
    """
    budget = (Tier.INT8.nominal_cost * len(off) + UNPROBED_BUDGET * (layers - len(off))) / layers
    return _plan("adaptive", budget, codec, Int4Layers(off), None)


def _plan(policy: str, budget: float, codec: Codec, int4: Int4Layers, basis: Basis | None) -> KvPlan:
    chosen = policies.get(policy)
    return KvPlan(
        policy=chosen,
        budget=chosen.budget(budget),
        scorer="attention",
        codec=codec,
        scope="layer",
        int4=int4,
        seed=0,
        basis=basis,
    )


def find_int4_layers(runner: ProbeRunner, codec: Codec) -> Int4Layers:
    """Return where INT4 may be used by a model that fails the trial with INT4 in all layers.

    The layers that INT4 harms most are sent at INT8, as few as let the trial pass with the others unchanged. For each
    prompt a bisection finds how many such layers its needle needs, so that each prompt runs once; two of three
    needles must be found.

    Args:
        runner: puts the questions.
        codec: writes INT4.
    """
    layers = runner.loaded.geometry.layers
    most = layers - 1
    if most == 0:
        return Int4Layers.in_none(layers)
    runner.progress.expect(1 + layers + len(runner.prompts) * (1 + bisection_steps(most)))
    ranking = _most_harmed_first(runner, codec)
    each = [_fewest_that_answer(runner, codec, prompt, ranking) for prompt in runner.prompts]
    enough = sorted(count for count in each if count is not None)[TRIALS_TO_PASS - 1 :]
    return Int4Layers(frozenset(ranking[: enough[0]])) if enough else Int4Layers.in_none(layers)


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
    """Return how many numbers `fewest_that_pass` tries at most."""
    return 1 + most.bit_length()


def _most_harmed_first(runner: ProbeRunner, codec: Codec) -> Sequence[int]:
    """Return the layers ranked by their damage: mean KL with one layer as in the trial and all others exact."""
    question = runner.prose_question(runner.stretches[0])
    exact = question.captured.exact_kv()
    received = runner.call(partial(question.received_kv, int4_trial(codec)))
    damage = []
    for layer, coded in enumerate(received):
        runner.progress.begin(f"prose with INT4 in layer {layer} only")
        kv = [*exact[:layer], coded, *exact[layer + 1 :]]
        damage.append(runner.call(partial(question.distance, kv)).kl / question.predictions)
    ranking = sorted(range(len(damage)), key=lambda layer: damage[layer], reverse=True)
    shown = ", ".join(f"{layer} ({damage[layer]:.2g})" for layer in ranking[:8])
    logger.info("probe: INT4 harms these layers most, in nats a token: %s", shown)
    return ranking


def _fewest_that_answer(
    runner: ProbeRunner, codec: Codec, prompt: NeedlePrompt, ranking: Sequence[int]
) -> int | None:
    """Return how many layers, the first of `ranking`, must do without INT4 for this needle to be found."""
    depth = f"{prompt.depth:.0%}"
    runner.progress.begin(f"the prompt with its needle at {depth} again")
    question = runner.call(partial(NeedleQuestion.put, runner.loaded, prompt))

    def answers(count: int) -> bool:
        runner.progress.begin(f"needle at {depth}, {count} layers without INT4")
        plan = int4_trial_without(codec, frozenset(ranking[:count]), len(ranking))
        return prompt.is_answered_by(runner.call(partial(question.answer_under, plan)))

    fewest = fewest_that_pass(len(ranking) - 1, answers)
    if fewest is None:
        logger.info("probe: the needle at %s is lost even with INT4 in one layer only", depth)
    else:
        logger.info("probe: the needle at %s is found with %d layers without INT4", depth, fewest)
    return fewest
