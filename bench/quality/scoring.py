"""Summarize how far predictions over received KV are from those over exact KV, with confidence intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

# Not imported at run time: the bench of kvpress runs on another transformers than the services.
if TYPE_CHECKING:
    from spectrumkv.bench.methods.method import MethodName
    from spectrumkv.prefill_server.tuning.divergence import Distance

RESAMPLES = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class WindowScore:
    """Score one method on one window.

    Attributes:
        tokens: number of scored tokens.
        nll: their negative log-likelihood, summed, in nats.
        nll_fp16: the same over exact FP16 KV.
        kl: Kullback–Leibler divergence of the method's distributions from those over FP16 KV, summed, in nats.
        agreed: number of tokens for which both have the same most likely next token.
        counted: counted bytes.
        fp16: bytes of the same KV at FP16.
        budget_nominal: the paper's mean cost per token.
    """

    tokens: int
    nll: float
    nll_fp16: float
    kl: float
    agreed: int
    counted: float
    fp16: int
    budget_nominal: float

    @classmethod
    def of(cls, distance: "Distance", tokens: int, counted: float, fp16: int, budget_nominal: float) -> "WindowScore":
        """Return the score of a window whose predictions are so far from those over exact KV."""
        return cls(
            tokens, distance.nll, distance.nll_fp16, distance.kl, distance.agreed, counted, fp16, budget_nominal
        )


@dataclass(frozen=True)
class Summary:
    """Summarize one method over all windows.

    Attributes:
        windows: number of windows.
        ppl: perplexity over received KV.
        ppl_fp16: perplexity over exact FP16 KV.
        ppl_delta_pct: by how many per cent the first exceeds the second.
        ppl_delta_pct_ci: its confidence interval; None for a single window.
        kl: mean KL per token, in nats.
        kl_ci: its confidence interval; None for a single window.
        top1_agreement: share of the tokens with the same most likely next token.
        budget_counted: counted bytes ÷ bytes at FP16.
        budget_nominal: mean tier budget of the windows.
    """

    windows: int
    ppl: float
    ppl_fp16: float
    ppl_delta_pct: float
    ppl_delta_pct_ci: list[float] | None
    kl: float
    kl_ci: list[float] | None
    top1_agreement: float
    budget_counted: float
    budget_nominal: float


def summarize(scores: Sequence[WindowScore]) -> Summary:
    """Return the summary of the scores of at least one window.

    Intervals are 95 % percentile bootstraps over windows, because neighbouring tokens depend on each other and
    windows hardly do. A window is drawn with both of its log-likelihoods, so that the difficulty of the text cancels
    in the difference.
    """
    columns = {
        name: np.array([getattr(one, name) for one in scores], dtype=np.float64)
        for name in WindowScore.__annotations__
    }
    tokens = columns["tokens"].sum()

    def delta_pct(rows: np.ndarray) -> np.ndarray:
        surplus = (columns["nll"] - columns["nll_fp16"])[rows].sum(axis=-1) / columns["tokens"][rows].sum(axis=-1)
        return np.asarray(100 * np.expm1(surplus))

    def mean_kl(rows: np.ndarray) -> np.ndarray:
        return np.asarray(columns["kl"][rows].sum(axis=-1) / columns["tokens"][rows].sum(axis=-1))

    everything = np.arange(len(scores))
    drawn = np.random.default_rng(0).integers(len(scores), size=(RESAMPLES, len(scores)))
    return Summary(
        windows=len(scores),
        ppl=float(np.exp(columns["nll"].sum() / tokens)),
        ppl_fp16=float(np.exp(columns["nll_fp16"].sum() / tokens)),
        ppl_delta_pct=float(delta_pct(everything)),
        ppl_delta_pct_ci=_interval(delta_pct(drawn)) if len(scores) > 1 else None,
        kl=float(mean_kl(everything)),
        kl_ci=_interval(mean_kl(drawn)) if len(scores) > 1 else None,
        top1_agreement=float(columns["agreed"].sum() / tokens),
        budget_counted=float(columns["counted"].sum() / columns["fp16"].sum()),
        budget_nominal=float(columns["budget_nominal"].mean()),
    )


def quality_row(method: "MethodName", scores: Sequence[WindowScore]) -> dict[str, Any]:
    """Return a method's row of `quality`, whose keys are stable."""
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


def _interval(resampled: np.ndarray) -> list[float]:
    tail = 50 * (1 - CONFIDENCE)
    return [float(bound) for bound in np.percentile(resampled, [tail, 100 - tail])]
