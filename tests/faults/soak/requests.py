"""What the requests of a soak ask for."""

import random
from dataclasses import replace

from spectrumkv.client.request import KvChoice, Sampling
from spectrumkv.common.kv.codecs import codecs
from tests.services.same_tokens import TOP_LOGPROBS

EXACT = KvChoice(policy="native")
# What is served by default, the range of its budgets, and every kind of tier.
QUANTIZED = (
    KvChoice(),
    *(KvChoice(policy="spectral", budget=budget) for budget in (0.1, 0.2, 0.5, 0.8)),
    KvChoice(budget=0.4),
    KvChoice(policy="adaptive", budget=0.3),
    KvChoice(policy="adaptive", budget=0.6),
    KvChoice(policy="greedy", budget=0.5),
    KvChoice(policy="balanced", budget=0.5),
    KvChoice(policy="uniform-int8"),
    KvChoice(policy="uniform-int4"),
    KvChoice(policy="fp16"),
)
# Below it not even INT4 everywhere fits, and a codec without a basis cannot be chosen.
LEAST_BASIS_FREE_BUDGET = 0.3


def coded_as(kv: KvChoice) -> tuple[KvChoice, ...]:
    """Where prefill may choose the codec for `kv` by itself, `kv` with each one named; else `kv`."""
    if kv.policy not in (None, "spectral"):
        return (kv,)
    spectral = codecs.get("spectral")
    fits = (kv.budget or LEAST_BASIS_FREE_BUDGET) >= LEAST_BASIS_FREE_BUDGET
    written_by = (spectral.name, spectral.fallback, *((spectral.basis_free,) if fits else ()))
    return tuple(replace(kv, codec=codec) for codec in written_by)


def greedy(tokens: int) -> Sampling:
    return Sampling(max_tokens=tokens, ignore_eos=True, logprobs=TOP_LOGPROBS)


def drawn(tokens: int, chance: random.Random) -> Sampling:
    return Sampling(
        max_tokens=tokens,
        ignore_eos=True,
        temperature=chance.choice((0.0, 0.7, 1.2)),
        top_p=chance.choice((0.5, 0.9, 1.0)),
        seed=chance.randrange(1 << 32),
    )
