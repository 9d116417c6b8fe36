"""Quality as it is served: exact prefill, received KV, next tokens scored over it, teacher-forced."""

from collections.abc import Callable, Sequence
from typing import Any

from spectrumkv.bench.methods.rows import describe, quality_row
from spectrumkv.bench.methods.served_model import ExactFp16, Method, ServedModel
from spectrumkv.bench.quality.scoring import WindowScore
from spectrumkv.bench.quality.windows import Window
from spectrumkv.prefill_server.tuning.divergence import compare

OnStep = Callable[[str], None]
"""Told in words what has just been done; once for each prefill, reference and method."""


def steps(windows: int, methods: int) -> int:
    """How often `measure` calls `on_step`."""
    return windows * (methods + 2)


def measure(
    served: ServedModel, windows: Sequence[Window], methods: Sequence[Method], on_step: OnStep
) -> list[dict[str, Any]]:
    """Measure methods on the same windows, each of which is prefilled exactly once.

    Returns:
        A row for each method, in their order.

    Raises:
        SpectrumKVError: a method cannot send the KV.
    """
    scores: list[list[WindowScore]] = [[] for _ in methods]
    for window in windows:
        for mine, score in zip(scores, score_window(served, window, methods, on_step), strict=True):
            mine.append(score)
    return [quality_row(method, mine) for method, mine in zip(methods, scores, strict=True)]


def score_window(
    served: ServedModel, window: Window, methods: Sequence[Method], on_step: OnStep
) -> list[WindowScore]:
    """Measure methods on one window; see `measure`."""
    prompt = served.prefill(window.context)
    on_step(f"window {window.index}: prefill")
    with served.receive(ExactFp16(), prompt) as (context, sent):
        reference, fp16 = served.extend(context, window.following), int(sent.counted)
    on_step(f"window {window.index}: exact FP16 KV")
    scores = []
    for method in methods:
        with served.receive(method, prompt) as (context, sent):
            logits = served.extend(context, window.following)
        distance = compare(logits, reference, window.targets)
        scores.append(
            WindowScore(
                tokens=len(window.targets),
                nll=distance.nll,
                nll_fp16=distance.nll_fp16,
                kl=distance.kl,
                agreed=distance.agreed,
                counted=sent.counted,
                fp16=fp16,
                nominal_budget=sent.nominal_budget,
            )
        )
        on_step(f"window {window.index}: {describe(method)}")
    return scores
