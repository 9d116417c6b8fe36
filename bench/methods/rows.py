"""Rows of `quality`, with the keys that others script against."""

from collections.abc import Sequence
from typing import Any, Protocol

from spectrumkv.bench.quality.scoring import WindowScore, summarize


class MethodName(Protocol):
    """What tells methods apart.

    Attributes:
        policy: who gets what.
        codec: what writes the bytes.
        scorer: what ranks the tokens; empty where nothing does.
        scope: "layer" or "model"; empty for methods that know no scope.
        budget: what it was asked to keep to.
    """

    @property
    def policy(self) -> str: ...  # noqa: D102
    @property
    def codec(self) -> str: ...  # noqa: D102
    @property
    def scorer(self) -> str: ...  # noqa: D102
    @property
    def scope(self) -> str: ...  # noqa: D102
    @property
    def budget(self) -> float: ...  # noqa: D102


def quality_row(method: MethodName, scores: Sequence[WindowScore]) -> dict[str, Any]:
    """Return a method's row: the keys that others script against, then more."""
    summary = summarize(scores)
    return {
        "policy": method.policy,
        "codec": method.codec,
        "budget_target": method.budget,
        "budget_nominal": summary.budget_nominal,
        "budget_counted": summary.budget_counted,
        "ppl": summary.ppl,
        "ppl_fp16": summary.ppl_fp16,
        "ppl_delta_pct": summary.ppl_delta_pct,
        "kl": summary.kl,
        "top1_agreement": summary.top1_agreement,
        "windows": summary.windows,
        "ppl_delta_pct_ci": summary.ppl_delta_pct_ci,
        "kl_ci": summary.kl_ci,
        "scorer": method.scorer,
        "scope": method.scope,
    }


def describe(method: MethodName) -> str:
    """A method in a few words."""
    scorer = f", {method.scorer}" if method.scorer else ""
    return f"{method.policy} ({method.codec}{scorer}) at {method.budget:g}"
