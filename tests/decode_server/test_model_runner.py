"""What a model runner counts, whatever it computes with."""

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import pytest
import torch
from prometheus_client import CollectorRegistry

from spectrumkv.common.generation.params import SamplingParams
from spectrumkv.common.generation.sampling import Sampler
from spectrumkv.common.generation.text import FinishReason, TextDelta, TextStream
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.telemetry.metrics import Metrics
from spectrumkv.decode_server.kv_pool import KvPool
from spectrumkv.decode_server.model_runner import DecodeRow, ModelRunner
from spectrumkv.decode_server.request import DecodeAnswer

GEOMETRY = KvGeometry(layers=1, kv_heads=1, head_dim=2, native_dtype=torch.float32)


class Text:
    """Text of a generation that ends after a number of tokens."""

    def __init__(self, tokens: int) -> None:
        self._left = tokens

    def push(self, token_id: int) -> TextDelta:
        self._left -= 1
        return TextDelta(str(token_id), FinishReason.LENGTH if self._left == 0 else None)


def answer(prompt_token_ids: Sequence[int] = (4, 5, 6), max_tokens: int = 3) -> DecodeAnswer:
    pool = KvPool(GEOMETRY, 1 << 10, torch.device("cpu"), Metrics(CollectorRegistry()))
    return DecodeAnswer(
        prompt_token_ids=prompt_token_ids,
        allocation=pool.reserve(len(prompt_token_ids) + max_tokens),
        sampler=Sampler(SamplingParams(max_tokens=max_tokens), prompt_token_ids),
        text=cast(TextStream, Text(max_tokens)),
    )


class Fake(ModelRunner):
    """Says that the token after t is t + 1."""

    def _forward(self, rows: Sequence[DecodeRow]) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor([row.token + 1 for row in rows]), 16).float()


def next_row(one: DecodeAnswer) -> DecodeRow:
    return DecodeRow(one, one.last_token, one.position)


def test_an_answer_advances_token_by_token() -> None:
    one, runner = answer(), Fake()
    one.start(7)
    assert (one.last_token, one.position) == (7, 3)
    assert not one.advance(runner.logits([next_row(one)])[0])
    assert (one.last_token, one.position) == (8, 4)
    assert one.advance(runner.logits([next_row(one)])[0])
    tokens = [one.outcomes.get_nowait() for _ in range(2)]
    assert [(token.index, token.sampled.token_id, token.delta.finish) for token in tokens] == [
        (1, 8, None),
        (2, 9, FinishReason.LENGTH),
    ]
    assert one.recomputed_prompt_tokens == 0


def test_only_positions_inside_the_prompt_are_recomputed() -> None:
    first, second, runner = answer(), answer(), Fake()
    runner.logits([DecodeRow(first, 4, 0), DecodeRow(second, 7, 3)])
    runner.logits([DecodeRow(first, 6, 2), DecodeRow(second, 8, 4)])
    assert (first.recomputed_prompt_tokens, second.recomputed_prompt_tokens) == (2, 0)


def test_a_request_has_a_prompt_and_room_for_an_answer() -> None:
    made = answer()
    for prompt_token_ids in ((), (1, 2, 3, 4, 5, 6)):
        with pytest.raises(ValueError, match="leaves no room"):
            replace(made, prompt_token_ids=prompt_token_ids)
