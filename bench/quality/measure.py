"""Measure quality as the services run: prefill exactly, receive the KV, score the next tokens over it."""

from collections.abc import Callable, Sequence
from typing import Any

from spectrumkv.bench.methods.method import REFERENCES, Method, describe
from spectrumkv.bench.methods.served_model import ServedModel
from spectrumkv.bench.quality.kept_scores import KeptScores
from spectrumkv.bench.quality.scoring import WindowScore, quality_row
from spectrumkv.bench.quality.texts import Window
from spectrumkv.prefill_server.tuning.divergence import compare

# Called after each prefill, reference and method with a text that says what was done.
OnStep = Callable[[str], None]


def steps(windows: int, methods: int) -> int:
    """Return how often `measure` calls `on_step`."""
    return windows * (methods + 2)


def measure(
    served: ServedModel,
    windows: Sequence[Window],
    methods: Sequence[Method],
    kept: KeptScores,
    on_step: OnStep,
    reference: Method = REFERENCES["fp16"],
) -> list[dict[str, Any]]:
    """Measure methods on the same windows; each window is prefilled exactly and once.

    Args:
        served: the model.
        windows: the windows.
        methods: the methods.
        kept: has the scores that are already known, and gets the others.
        on_step: called after each step with a text that says what was done.
        reference: what the methods are compared with.

    Returns:
        A row for each method, in their order.

    Raises:
        SpectrumKVError: a method cannot send the KV, or a score cannot be kept.
    """
    for window in windows:
        missing = [method for method in methods if not kept.has(window.index, method)]
        if missing:
            for method, score in zip(missing, score_window(served, window, missing, on_step, reference), strict=True):
                kept.add(window.index, method, score)
    return [quality_row(method, [kept.get(window.index, method) for window in windows]) for method in methods]


def score_window(
    served: ServedModel, window: Window, methods: Sequence[Method], on_step: OnStep, reference: Method
) -> list[WindowScore]:
    """Return a score for each method on one window; see `measure`."""
    prompt = served.prefill(window.context)
    on_step(f"window {window.index}: prefill")
    with served.receive(reference, prompt) as (context, sent):
        expected, fp16 = served.extend(context, window.following), int(sent.counted)
    on_step(f"window {window.index}: exact {reference.codec} KV")
    scores = []
    for method in methods:
        with served.receive(method, prompt) as (context, sent):
            logits = served.extend(context, window.following)
        distance = compare(logits, expected, window.targets)
        scores.append(WindowScore.of(distance, len(window.targets), sent.counted, fp16, sent.budget_nominal))
        on_step(f"window {window.index}: {describe(method)}")
    return scores
