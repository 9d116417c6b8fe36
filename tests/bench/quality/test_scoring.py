import math

import pytest
import torch

from spectrumkv.bench.quality.scoring import WindowScore, summarize
from spectrumkv.prefill_server.tuning.divergence import compare

VOCABULARY = 37


def score(kl: float, nll: float = 130.0, nll_fp16: float = 128.0, counted: float = 30.0) -> WindowScore:
    return WindowScore(
        tokens=64, nll=nll, nll_fp16=nll_fp16, kl=kl, agreed=60, counted=counted, fp16=100, budget_nominal=0.25
    )


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 130])
def test_comparison_is_the_textbooks(tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    ours, theirs = (3 * torch.randn(tokens, VOCABULARY, generator=generator) for _ in range(2))
    targets = torch.randint(VOCABULARY, (tokens,), generator=generator).tolist()
    distance = compare(ours, theirs, targets)
    kl = nll = nll_fp16 = 0.0
    for mine, exact, target in zip(ours.double().tolist(), theirs.double().tolist(), targets, strict=True):
        q = [math.exp(one) / sum(map(math.exp, mine)) for one in mine]
        p = [math.exp(one) / sum(map(math.exp, exact)) for one in exact]
        kl += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        nll -= math.log(q[target])
        nll_fp16 -= math.log(p[target])
    assert distance.kl == pytest.approx(kl)
    assert distance.nll == pytest.approx(nll)
    assert distance.nll_fp16 == pytest.approx(nll_fp16)
    assert distance.agreed == sum(int(a.argmax() == b.argmax()) for a, b in zip(ours, theirs, strict=True))


def test_equal_distributions_are_at_no_distance() -> None:
    logits = torch.randn(10, VOCABULARY)
    distance = compare(logits, logits.clone(), list(range(10)))
    assert (distance.kl, distance.agreed) == (0.0, 10)
    assert distance.nll == distance.nll_fp16


def test_small_divergences_are_not_lost() -> None:
    logits = torch.randn(50, VOCABULARY, dtype=torch.float64)
    moved = logits.clone()
    moved[:, 0] += 1e-5
    p = torch.softmax(logits, -1)[:, 0]
    # To second order, moving one logit by ε costs ε² · p(1 − p) / 2.
    expected = float((p * (1 - p)).sum()) * 1e-10 / 2
    assert compare(moved, logits, [0] * 50).kl == pytest.approx(expected, rel=1e-3)


def test_windows_are_put_together_by_their_tokens() -> None:
    summary = summarize([score(kl=0.64, counted=20), score(kl=1.28, counted=40)])
    assert summary.windows == 2
    assert summary.kl == pytest.approx(0.015)
    assert summary.ppl == pytest.approx(math.exp(130 / 64))
    assert summary.ppl_fp16 == pytest.approx(math.exp(128 / 64))
    assert summary.ppl_delta_pct == pytest.approx(100 * (math.exp(2 / 64) - 1))
    assert summary.top1_agreement == pytest.approx(60 / 64)
    assert summary.budget_counted == pytest.approx(0.3)
    # All windows differ alike, so their error is none.
    assert summary.ppl_delta_pct_ci == pytest.approx([summary.ppl_delta_pct] * 2)
    assert summary.kl_ci == pytest.approx([0.01, 0.02])


def test_the_interval_is_about_two_standard_errors() -> None:
    generator = torch.Generator().manual_seed(0)
    kl = (1 + 0.2 * torch.randn(100, generator=generator)).tolist()
    summary = summarize([score(kl=64 * one) for one in kl])
    assert summary.kl_ci is not None
    low, high = summary.kl_ci
    error = float(torch.tensor(kl).std()) / math.sqrt(100)
    assert low < summary.kl < high
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_one_window_tells_nothing_of_its_error() -> None:
    summary = summarize([score(kl=0.64)])
    assert summary.kl_ci is None
    assert summary.ppl_delta_pct_ci is None
