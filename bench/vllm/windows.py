"""Measures a pair of vLLM servers on windows of a text: one prefills, the other reads on over the received KV."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from spectrumkv.bench.quality.kept_scores import KeptScores
from spectrumkv.bench.quality.scoring import WindowScore, quality_row
from spectrumkv.bench.quality.texts import Window
from spectrumkv.bench.vllm.engine import COMPUTED_TOKENS, FETCHED_BYTES, EnginePair
from spectrumkv.bench.vllm.predictions import Prediction, compare, read_on
from spectrumkv.common.errors import FailedPreconditionError
from spectrumkv.common.kv.geometry import KvGeometry

# Steps that vLLM may schedule ahead of a request's end.
STEPS_AHEAD = 4


@dataclass(frozen=True)
class Setting:
    """How KV is coded; what `MethodName` asks for.

    Attributes:
        policy: of the transfer; its codec has the same name.
        budget: target relative to FP16.
    """

    policy: str
    budget: float
    scorer: str = "attention"
    scope: str = "layer"

    @property
    def codec(self) -> str:
        """Return the codec's name."""
        return self.policy

    @property
    def params(self) -> dict[str, Any]:
        """Return `kv_transfer_params`."""
        return {"policy": self.policy} | ({} if self.policy == "native" else {"budget": self.budget})


def measure(
    pair: EnginePair,
    windows: Sequence[Window],
    settings: Sequence[Setting],
    most: int,
    geometry: KvGeometry,
    kept: KeptScores,
    on_step: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Measure settings on the same windows, beside what decode predicts over KV that it computed itself.

    Args:
        pair: the servers; decode runs `ForcedTokens`.
        windows: the windows.
        settings: the settings.
        most: how many of the most likely tokens are compared; -1 is all.
        geometry: of their model's KV.
        kept: has the scores that are known, and gets the others.
        on_step: called after the exact predictions and after each setting of a window with what was done.

    Returns:
        A row for each setting, in their order, with the keys of `quality`.

    Raises:
        SpectrumKVError: a server does not answer, decode computed a prompt whose KV it should have got, or a score
            cannot be kept.
    """
    for window in windows:
        missing = [one for one in settings if not kept.has(window.index, one)]
        exact = _read(pair, window, most, None) if missing else []
        on_step(f"window {window.index}: exact")
        for one in settings:
            if one in missing:
                kept.add(window.index, one, score(pair, window, one, most, geometry, exact))
            on_step(f"window {window.index}: {one.policy} at {one.budget:g}")
    return [_row(one, [kept.get(window.index, one) for window in windows]) for one in settings]


def score(
    pair: EnginePair,
    window: Window,
    setting: Setting,
    most: int,
    geometry: KvGeometry,
    exact: Sequence[Prediction],
) -> WindowScore:
    """Measure a setting on a window.

    Args:
        pair: see `measure`.
        window: the window.
        setting: the setting.
        most: see `measure`.
        geometry: see `measure`.
        exact: predictions of the same tokens over decode's own KV.

    Returns:
        The score; it has no nominal budget, which servers do not tell.

    Raises:
        FailedPreconditionError: decode computed the prompt.
        UnavailableError: a server does not answer, or refuses.
    """
    _, transfer = pair.prefilled(list(window.context), **setting.params)
    fetched, computed = (pair.decode.metric(name) for name in (FETCHED_BYTES, COMPUTED_TOKENS))
    received = _read(pair, window, most, transfer)
    more = pair.decode.metric(COMPUTED_TOKENS) - computed
    if more > len(window.targets) + STEPS_AHEAD:
        raise FailedPreconditionError(
            f"{pair.decode.url} computed {more:g} tokens to predict {len(window.targets)}: KV did not come, or "
            "others use the server; look into its log"
        )
    counted = pair.decode.metric(FETCHED_BYTES) - fetched
    fp16 = geometry.fp16_bytes(len(window.context))
    return WindowScore.of(compare(received, exact), len(window.targets), counted, fp16, math.nan)


def _read(pair: EnginePair, window: Window, most: int, transfer: Mapping[str, Any] | None) -> list[Prediction]:
    """Have decode read on over KV that it gets; with None over its own.

    Returns:
        Its predictions of the window's targets.
    """
    given = {} if transfer is None else {"kv_transfer_params": transfer}
    # The first token after the prompt is the only one that is not predicted over received KV.
    prompt = (*window.context, window.following[0])
    return read_on(pair.decode, prompt, window.targets, most, cache_salt=str(uuid4()), **given)


def _row(setting: Setting, scores: Sequence[WindowScore]) -> dict[str, Any]:
    """Return a row without the tiers' mean cost, which servers do not tell."""
    return {name: value for name, value in quality_row(setting, scores).items() if name != "budget_nominal"}
