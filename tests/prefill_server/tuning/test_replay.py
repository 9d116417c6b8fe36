"""The probe's own generation must be the model's, or its verdicts mean nothing."""

import pytest
import torch

from spectrumkv.common.kv.allocation import Int4Layers
from spectrumkv.common.kv.codecs.base import codecs
from spectrumkv.common.kv.policies import policies
from spectrumkv.common.kv.tiers import Tier, count_tiers
from spectrumkv.common.model.load import LoadedModel, load_model
from spectrumkv.prefill_server.engine.attention import ATTENTION_NAME
from spectrumkv.prefill_server.transfer.plan import KvPlan
from spectrumkv.prefill_server.tuning.replay import capture_prompt, generate_over, logits_over
from tests.tiny_models import ARCHITECTURES, SLIDING_WINDOW, tiny_model

GENERATED = 12
# Shorter than the sliding window and reaching its end while generating; one token short of it; longer.
LENGTHS = (SLIDING_WINDOW - GENERATED // 2, SLIDING_WINDOW - 1, SLIDING_WINDOW, 3 * SLIDING_WINDOW + 5)


def prompt_of(length: int) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(5, 49_000, (length,), generator=generator).tolist()


@pytest.fixture(scope="module", params=ARCHITECTURES)
def plain(request: pytest.FixtureRequest) -> LoadedModel:
    """A model that attends by transformers' own `sdpa`, or `eager` where logits are capped."""
    return load_model(str(tiny_model(request.param)), "cpu")


@pytest.fixture(scope="module")
def hooked(plain: LoadedModel) -> LoadedModel:
    loaded = load_model(str(tiny_model(plain.spec.architecture)), "cpu")
    loaded.model.set_attn_implementation(ATTENTION_NAME)
    return loaded


def plan_of(policy: str, codec: str, budget: float) -> KvPlan:
    chosen = policies.get(policy)
    return KvPlan(chosen, chosen.budget(budget), "attention", codecs.get(codec), "layer", Int4Layers(), seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("length", LENGTHS)
def test_over_exact_kv_it_generates_what_transformers_does(
    plain: LoadedModel, hooked: LoadedModel, length: int
) -> None:
    prompt = prompt_of(length)
    ids = torch.tensor([prompt])
    whole = plain.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=GENERATED, do_sample=False, pad_token_id=2
    )
    expected = whole[0, length:].tolist()
    captured = capture_prompt(hooked.model, prompt, window=8)
    exact = captured.exact_kv()
    assert generate_over(hooked.model, exact, captured.first_token, GENERATED, hooked.eos_token_ids) == expected
    # The model's own dtype, coded and decoded, is the same cache.
    received = captured.received_kv(plan_of("native", "native", 1.0), hooked.geometry)
    assert generate_over(hooked.model, received, captured.first_token, GENERATED, hooked.eos_token_ids) == expected


def test_received_kv_is_the_exact_one_at_the_precision_of_its_tiers(hooked: LoadedModel) -> None:
    captured = capture_prompt(hooked.model, prompt_of(100), window=8)
    plan = plan_of("greedy", "absmax", 0.3)
    received = captured.received_kv(plan, hooked.geometry)
    assert len(received) == hooked.geometry.layers
    for layer, kv in zip(captured.layers, received, strict=True):
        [segment] = plan.encoder(hooked.geometry, layer.tokens, framing_bytes=0).encode(layer)
        tiers = segment.tiers
        assert count_tiers(tiers)[Tier.INT4] == 80
        steps = torch.where(tiers == Tier.INT4, 1 / 7, 1 / 127)
        for exact, coded in ((layer.keys, kv.keys), (layer.values, kv.values)):
            error = (coded - exact).abs().amax(dim=-1)
            # Half a step, and what the scale loses as a float16.
            allowed = exact.abs().amax(dim=-1) * (0.5 * steps + 2e-3)
            assert (error <= allowed).all()
            assert (error[:, tiers == Tier.INT4] > 0).any()


def test_a_draft_changes_nothing_however_right_it_is(hooked: LoadedModel) -> None:
    captured = capture_prompt(hooked.model, prompt_of(60), window=8)
    kv = captured.exact_kv()
    first, eos = captured.first_token, hooked.eos_token_ids
    expected = generate_over(hooked.model, kv, first, GENERATED, eos)
    for right in range(1, len(expected) + 1):
        wrong = [(token + 1) % hooked.spec.vocab_size for token in expected[right:]]
        assert generate_over(hooked.model, kv, first, GENERATED, eos, draft=expected[:right] + wrong) == expected
        # One that stops early is gone on from.
        assert generate_over(hooked.model, kv, first, GENERATED, eos, draft=expected[:right]) == expected


def test_one_pass_predicts_what_steps_do(hooked: LoadedModel) -> None:
    captured = capture_prompt(hooked.model, prompt_of(60), window=8)
    kv = captured.exact_kv()
    tokens = generate_over(hooked.model, kv, captured.first_token, GENERATED, ())
    logits = logits_over(hooked.model, kv, tokens)
    assert logits.shape == (GENERATED, hooked.spec.vocab_size)
    assert logits[:-1].argmax(dim=-1).tolist() == tokens[1:]


def test_generation_ends_at_eos_and_at_the_limit(hooked: LoadedModel) -> None:
    captured = capture_prompt(hooked.model, prompt_of(40), window=8)
    kv = captured.exact_kv()
    free = generate_over(hooked.model, kv, captured.first_token, 6, ())
    assert len(free) == 6
    third = free.index(free[2])
    assert generate_over(hooked.model, kv, captured.first_token, 6, {free[2]}) == free[: third + 1]
    assert generate_over(hooked.model, kv, captured.first_token, 1, ()) == free[:1]
