from pathlib import Path

import pytest
import torch

from spectrumkv.bench.main import main
from spectrumkv.bench.models.key_bias import BiasNorms, build_key_bias_model, key_bias_model_directory
from spectrumkv.common.errors import FailedPreconditionError
from spectrumkv.common.kv.codecs.base import codecs
from spectrumkv.common.model.load import LoadedModel, load_model
from spectrumkv.prefill_server.engine.engine import PrefillEngine
from spectrumkv.prefill_server.tuning.basis_cache import resolve_basis
from spectrumkv.prefill_server.tuning.needle.haystack import haystack
from spectrumkv.prefill_server.tuning.probe.runner import ProbeProgress, ProbeRunner
from spectrumkv.prefill_server.tuning.probe.sweep import budget_sweep
from spectrumkv.prefill_server.verdict import passes
from tests.services.kv.test_lossless import random_prompt
from tests.tiny_models import tiny_model

TOKENS = 48
TINY_NORMS = BiasNorms(first=60.0, middle=30.0, last=90.0)


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    directory = tmp_path_factory.mktemp("key-bias")
    build_key_bias_model(tiny_model("llama"), directory, TINY_NORMS)
    return load_model(str(directory), "cpu")


@torch.inference_mode()
def logits(loaded: LoadedModel) -> torch.Tensor:
    computed: torch.Tensor = loaded.model(input_ids=torch.tensor([random_prompt(TOKENS)]), use_cache=False).logits[0]
    return computed


def key_bias(loaded: LoadedModel, layer: int) -> torch.Tensor:
    bias: torch.Tensor = loaded.model.model.layers[layer].self_attn.k_proj.bias
    return bias


@pytest.mark.slow
def test_it_is_a_qwen2_with_the_same_weights_and_tokenizer(biased: LoadedModel, tiny_llama: LoadedModel) -> None:
    assert biased.spec.architecture == "qwen2"
    assert biased.spec.tokenizer_digest == tiny_llama.spec.tokenizer_digest
    assert biased.tokenizer.chat_template == tiny_llama.tokenizer.chat_template
    directories = biased.model.config.name_or_path, tiny_llama.model.config.name_or_path
    ours, theirs = (load_model(directory, "cpu", packed=False).model for directory in directories)
    same = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(same[name], parameter, rtol=0, atol=0)


def test_only_keys_have_biases_and_their_norms_are_as_asked(biased: LoadedModel) -> None:
    for layer, norm in enumerate((60.0, 30.0, 90.0)):
        attention = biased.model.model.layers[layer].self_attn
        assert not attention.q_proj.bias.any()
        assert not attention.v_proj.bias.any()
        # Rounding to whole numbers moves each element by half a unit at most.
        bias = key_bias(biased, layer)
        assert float(bias.norm()) == pytest.approx(norm, abs=0.5 * float(bias.count_nonzero()) ** 0.5)
        assert torch.equal(bias, bias.round())


def test_it_computes_the_same_which_other_directions_would_not(biased: LoadedModel, tiny_llama: LoadedModel) -> None:
    expected = logits(tiny_llama)
    spread = float(expected.std())
    assert float((logits(biased) - expected).square().mean().sqrt()) < 0.05 * spread
    biases = [key_bias(biased, layer) for layer in range(3)]
    kept = [bias.clone() for bias in biases]
    try:
        # The same numbers in the fastest pairs are another model.
        for bias in biases:
            bias.copy_(bias.view(2, 2, 32).flip(2).flatten())
        assert float((logits(biased) - expected).square().mean().sqrt()) > 0.5 * spread
    finally:
        for bias, before in zip(biases, kept, strict=True):
            bias.copy_(before)


@pytest.mark.slow
def test_building_again_builds_the_same(biased: LoadedModel, tmp_path: Path) -> None:
    build_key_bias_model(tiny_model("llama"), tmp_path, TINY_NORMS)
    assert load_model(str(tmp_path), "cpu").spec == biased.spec


@pytest.mark.parametrize(("architecture", "said"), [("qwen2", "type 'qwen2'"), ("mistral", "type 'mistral'")])
def test_other_models_are_refused(tmp_path: Path, architecture: str, said: str) -> None:
    with pytest.raises(FailedPreconditionError, match=said):
        build_key_bias_model(tiny_model(architecture), tmp_path, TINY_NORMS)


@torch.inference_mode()
def mean_nll(loaded: LoadedModel, token_ids: list[int]) -> float:
    ids = torch.tensor([token_ids])
    predicted = loaded.model(input_ids=ids[:, :-1], use_cache=False).logits[0]
    return float(torch.nn.functional.cross_entropy(predicted, ids[0, 1:]))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_default_model_keeps_its_perplexity_and_loses_int4(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["key-bias-model"]) == 0
    assert capsys.readouterr().out == f"{key_bias_model_directory()}\n"
    original, biased = load_model(None, "cpu"), load_model(str(key_bias_model_directory()), "cpu")
    norms = [float(key_bias(biased, layer).norm()) for layer in range(30)]
    assert norms[0] == pytest.approx(600, rel=0.01)
    assert norms[-1] == pytest.approx(900, rel=0.01)
    # Other prose than the directions were found on.
    text = "".join(haystack(0).sentences)
    token_ids = original.tokenizer(text, add_special_tokens=False, verbose=False).input_ids[2048 : 2048 + 2049]
    assert mean_nll(biased, token_ids) == pytest.approx(mean_nll(original, token_ids), abs=0.005)
    with PrefillEngine(biased, window=8) as engine:
        # The two settings that say it; the search for layers is tested on a small model, which takes seconds.
        int4, *counted = budget_sweep(
            codecs.get("absmax"), codecs.get("spectral"), resolve_basis(biased, lambda done: None)
        )
        plans = [int4, next(plan for plan in counted if plan.budget.value == 0.25)]
        trials, settings = ProbeRunner.of(biased, engine, ProbeProgress(str)).measure(plans)
    assert sum(one.found_fp16 for one in trials) >= 2
    assert not passes(trials)
    broken, sound = settings
    assert not broken.safe
    assert sound.safe
    assert sound.kl < broken.kl / 1000
