"""The settings that the probe tries."""

from spectrumkv.common.kv.allocation import Int4Layers
from spectrumkv.common.kv.codecs.base import Codec, codecs
from spectrumkv.common.kv.codecs.spectral.basis import SpectralBasis
from spectrumkv.common.kv.codecs.spectral.codec import SpectralCodec
from spectrumkv.common.kv.policies import policies
from spectrumkv.common.kv.tiers import Tier
from spectrumkv.prefill_server.transfer.plan import KvPlan
from spectrumkv.prefill_server.tuning.probe.verdict import UNPROBED_BUDGET

COUNTED_BUDGETS = (0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1)


def budget_sweep(codec: Codec, basis: SpectralBasis) -> list[KvPlan]:
    """Return the trial of INT4, written by `codec`, and after it the counted budgets of the spectral codec."""
    spectral = codecs.get(SpectralCodec.name)
    counted = [_plan(SpectralCodec.name, budget, spectral, Int4Layers(), basis) for budget in COUNTED_BUDGETS]
    return [int4_trial(codec), *counted]


def int4_trial(codec: Codec) -> KvPlan:
    """The paper's: three tiers by Greedy at 0.3."""
    return _plan("greedy", UNPROBED_BUDGET, codec, Int4Layers(), None)


def int4_trial_without(codec: Codec, off: frozenset[int], layers: int) -> KvPlan:
    """The same with INT8 in some of `layers` layers. It costs more by that: it asks what INT4 does elsewhere."""
    budget = (Tier.INT8.nominal_cost * len(off) + UNPROBED_BUDGET * (layers - len(off))) / layers
    return _plan("adaptive", budget, codec, Int4Layers(off), None)


def plan_name(plan: KvPlan) -> str:
    """Return a setting for people: "greedy by absmax at 0.3"."""
    written_by = "" if plan.codec.name == plan.policy.name else f" by {plan.codec.name}"
    return f"{plan.policy.name}{written_by} at {plan.budget:g}"


def _plan(policy: str, budget: float, codec: Codec, int4: Int4Layers, basis: SpectralBasis | None) -> KvPlan:
    return KvPlan(
        policy=policies.get(policy),
        budget=budget,
        scorer="attention",
        codec=codec,
        scope="layer",
        int4=int4,
        seed=0,
        basis=basis,
    )
