import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.kv.scoring import (
    DECAY_RATE,
    attention,
    combine,
    decay,
    key_norm,
    mean_attention,
    position,
    random,
    scorers,
)
from spectrumkv.common.service.config import PrefillConfig
from spectrumkv.kernels.attention_scores import cpu as attention_scores_cpu

SEED = 7


@pytest.fixture(scope="module", autouse=True)
def products_of_float32():
    """As processors without products of bfloat16 have them; tests/kernels/attention_scores tries both."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_scores_cpu, "multiplies_bfloat16", lambda: False)
        yield


def observe(
    tokens: int = 19,
    window: int = 5,
    query_heads: int = 6,
    kv_heads: int = 2,
    head_dim: int = 8,
    softcap: float | None = None,
    sliding_window: int | None = None,
    layer: int = 3,
    dtype: torch.dtype = torch.float32,
) -> tuple[LayerCapture, torch.Tensor]:
    """A capture of random tensors, and the queries of all positions that it was cut from."""
    generator = torch.Generator().manual_seed(tokens * 1000 + window)
    all_queries = torch.randn(query_heads, tokens, head_dim, generator=generator).to(dtype) * 2
    keys, values = (torch.randn(kv_heads, tokens, head_dim, generator=generator).to(dtype) for _ in range(2))
    capture = LayerCapture(
        queries=all_queries[:, tokens - window :],
        keys=keys,
        values=values,
        scaling=head_dim**-0.5,
        softcap=softcap,
        sliding_window=sliding_window,
        layer=layer,
    )
    return capture, all_queries


def naive_attention(capture: LayerCapture, all_queries: torch.Tensor) -> torch.Tensor:
    """`[n]`, element by element from the full n × n attention matrix, in float64."""
    kv_heads, tokens, _ = capture.keys.shape
    group = all_queries.shape[0] // kv_heads
    window = capture.queries.shape[1]
    result = torch.zeros(kv_heads, tokens, dtype=torch.float64)
    for kv_head in range(kv_heads):
        received: list[list[float]] = [[] for _ in range(tokens)]
        for query_head in range(kv_head * group, (kv_head + 1) * group):
            logits = all_queries[query_head].double() @ capture.keys[kv_head].double().T * capture.scaling
            if capture.softcap is not None:
                logits = capture.softcap * torch.tanh(logits / capture.softcap)
            for query in range(tokens):
                reach = capture.sliding_window or tokens
                seen = [token for token in range(query + 1) if query - token < reach]
                probabilities = torch.softmax(logits[query, seen], dim=0)
                if query >= tokens - window:
                    for token, probability in zip(seen, probabilities.tolist(), strict=True):
                        received[token].append(probability)
        result[kv_head] = torch.tensor([sum(one) / len(one) if one else 0.0 for one in received])
    return result.mean(dim=0)


SHAPES = [
    {},
    {"query_heads": 3, "kv_heads": 3},
    {"query_heads": 9, "kv_heads": 3, "head_dim": 4},
    {"query_heads": 4, "kv_heads": 1},
    {"tokens": 1, "window": 1},
    {"tokens": 2, "window": 1},
    {"tokens": 11, "window": 11},
    {"softcap": 2.0},
    {"sliding_window": 1},
    {"sliding_window": 4},
    {"sliding_window": 19},
    {"tokens": 30, "window": 7, "softcap": 5.0, "sliding_window": 9},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mean_attention_is_that_of_the_full_matrix(shape):
    capture, all_queries = observe(**shape)
    expected = naive_attention(capture, all_queries)
    actual = mean_attention(capture)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(attention(capture, SEED), actual)


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_mean_attention_is_that_of_the_full_matrix_at_any_shape(data):
    tokens = data.draw(st.integers(1, 14))
    kv_heads = data.draw(st.integers(1, 3))
    capture, all_queries = observe(
        tokens=tokens,
        window=data.draw(st.integers(1, tokens)),
        kv_heads=kv_heads,
        query_heads=kv_heads * data.draw(st.integers(1, 3)),
        softcap=data.draw(st.none() | st.floats(0.5, 50)),
        sliding_window=data.draw(st.none() | st.integers(1, 20)),
    )
    expected = naive_attention(capture, all_queries)
    torch.testing.assert_close(mean_attention(capture).double(), expected, rtol=1e-5, atol=1e-6)


def test_mean_attention_on_a_worked_example():
    # Zero queries attend evenly: the query at 2 gives thirds, the one at 3 quarters.
    capture = replace(observe(tokens=4, window=2, query_heads=1, kv_heads=1)[0], queries=torch.zeros(1, 2, 8))
    both = (1 / 3 + 1 / 4) / 2
    torch.testing.assert_close(mean_attention(capture), torch.tensor([both, both, both, 1 / 4]))


def test_tokens_that_the_sliding_window_hides_score_zero():
    # Queries stand at 14 … 18 and see three tokens each, so 12 is the first that any of them sees.
    scores = attention(observe(sliding_window=3)[0], SEED)
    assert scores[:12].tolist() == [0.0] * 12
    assert (scores[12:] > 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_computed_in_float32(dtype):
    capture, _ = observe(dtype=dtype)
    in_float32 = replace(
        capture,
        queries=capture.queries.float(),
        keys=capture.keys.float(),
        values=capture.values.float(),
    )
    for name in scorers:
        assert torch.equal(scorers.get(name)(capture, SEED), scorers.get(name)(in_float32, SEED)), name


@pytest.mark.parametrize(("bfloat16", "tolerance"), [(False, 1e-3), (True, 0.03)])
def test_attention_survives_the_large_key_biases_of_qwen(bfloat16, tolerance, monkeypatch):
    monkeypatch.setattr(attention_scores_cpu, "multiplies_bfloat16", lambda: bfloat16)
    capture, all_queries = observe(dtype=torch.float16)
    capture.keys[..., 3] += 900
    scores = mean_attention(capture)
    assert scores.isfinite().all()
    torch.testing.assert_close(scores.double(), naive_attention(capture, all_queries), rtol=tolerance, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", scorers.names())
def test_every_scorer_gives_one_finite_float32_per_token(name, shape):
    capture, _ = observe(**shape)
    before = [one.clone() for one in (capture.queries, capture.keys, capture.values)]
    scores = scorers.get(name)(capture, SEED)
    assert scores.shape == (capture.tokens,)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()
    assert torch.equal(scores, scorers.get(name)(observe(**shape)[0], SEED))
    for original, now in zip(before, (capture.queries, capture.keys, capture.values), strict=True):
        assert torch.equal(original, now), "a scorer must leave the model's tensors alone"


@pytest.mark.parametrize("name", scorers.names())
def test_every_scorer_takes_views_of_any_strides(name):
    capture, _ = observe()
    as_views = replace(
        capture,
        **{
            part: getattr(capture, part).transpose(0, 1).contiguous().transpose(0, 1)
            for part in ("queries", "keys", "values")
        },
    )
    torch.testing.assert_close(scorers.get(name)(as_views, SEED), scorers.get(name)(capture, SEED))


def test_the_scorers_are_those_of_the_interface():
    assert set(scorers) == {"attention", "decay", "key_norm", "position", "random"}
    assert scorers.get(PrefillConfig.scorer) is attention


def test_an_unknown_scorer_is_refused_with_the_valid_names():
    with pytest.raises(InvalidArgumentError, match=r"unknown scorer 'vibes'; allowed: attention, decay"):
        scorers.get("vibes")


def test_decay_is_attention_times_the_papers_factor():
    capture, _ = observe()
    expected = [a * math.exp(-0.005 * (19 - j)) for j, a in enumerate(attention(capture, SEED).tolist(), start=1)]
    torch.testing.assert_close(decay(capture, SEED), torch.tensor(expected))


def test_position_depends_on_distance_from_the_end_only():
    scores = position(observe()[0], SEED)
    assert scores[-1] == 1
    torch.testing.assert_close(scores[1:] / scores[:-1], torch.full((18,), math.exp(DECAY_RATE)))


def test_key_norm_prefers_short_keys():
    capture, _ = observe(tokens=3, window=1, kv_heads=2, query_heads=2, head_dim=2)
    keys = torch.tensor([[[3.0, 4.0], [0.0, 1.0], [0.0, 0.0]], [[0.0, 0.0], [2.0, 0.0], [6.0, 8.0]]])
    assert key_norm(replace(capture, keys=keys), SEED).tolist() == [-2.5, -1.5, -5.0]


def test_random_differs_between_seeds_and_layers_and_lies_in_the_unit_interval():
    draws = {
        (seed, layer): random(observe(layer=layer)[0], seed)
        for seed, layer in [(0, 0), (0, 1), (1, 0), (2**64 - 1, 0)]
    }
    assert len({tuple(draw.tolist()) for draw in draws.values()}) == len(draws)
    assert all(bool(((draw >= 0) & (draw < 1)).all()) for draw in draws.values())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"queries": torch.zeros(6, 20, 8)}, r"queries \(6, 20, 8\).*w ≤ n"),
        ({"queries": torch.zeros(5, 3, 8)}, "multiple of kv_heads"),
        ({"queries": torch.zeros(6, 3, 4)}, "do not fit together"),
        ({"queries": torch.zeros(6, 0, 8)}, "none of them empty"),
        ({"queries": torch.zeros(6, 8)}, "do not fit together"),
        ({"values": torch.zeros(2, 18, 8)}, r"values \(2, 18, 8\)"),
        ({"scaling": math.nan}, "scaling is nan"),
        ({"scaling": 0.0}, "scaling is 0.0"),
        ({"softcap": 0.0}, "softcap is 0.0"),
        ({"sliding_window": 0}, "sliding window is 0"),
        ({"layer": -1}, "layer is -1"),
    ],
)
def test_a_capture_that_does_not_fit_is_refused(change, complaint):
    with pytest.raises(InvalidArgumentError, match=complaint):
        replace(observe()[0], **change)


def test_combine_is_the_mean_of_ranks_on_a_worked_example():
    attended = torch.tensor([0.9, 0.02, 0.05, 0.03])  # ranks 4 1 3 2
    negative = torch.tensor([-5.0, -2.0, -2.0, -9.0])  # ranks 2 3.5 3.5 1
    assert combine([attended, negative]).tolist() == [0.75, 0.5625, 0.8125, 0.375]


def test_combine_gives_alike_tokens_the_same_score():
    assert combine([torch.zeros(5)] * 3).unique().numel() == 1


finite = st.floats(-100, 100, width=16)


@given(st.integers(1, 4), st.integers(1, 12), st.data())
def test_combine_is_indifferent_to_scale_and_order_of_layers(layers, tokens, data):
    scores = [torch.tensor(data.draw(st.lists(finite, min_size=tokens, max_size=tokens))) for _ in range(layers)]
    combined = combine(scores)
    assert combined.dtype == torch.float32
    assert combined.shape == (tokens,)
    assert ((combined > 0) & (combined <= 1)).all()
    torch.testing.assert_close(combine([1000 * one for one in reversed(scores)]), combined)


def test_combine_of_one_layer_keeps_its_order():
    scores = torch.tensor([0.3, -1.0, 7.0, 0.2])
    assert combine([scores]).argsort().tolist() == scores.argsort().tolist()


@pytest.mark.parametrize(
    ("layers", "complaint"), [([], "none"), ([torch.zeros(2), torch.zeros(3)], r"\(2,\), \(3,\)")]
)
def test_combine_refuses_no_layers_and_different_lengths(layers, complaint):
    with pytest.raises(InvalidArgumentError, match=complaint):
        combine(layers)
