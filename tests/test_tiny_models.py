"""The small random models of the tests: other tests could not see a fault in a model that hardly reacts."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spectrumkv.common.model.load import LoadedModel, load_model
from tests.tiny_models import ARCHITECTURES, build_tiny_model, tiny_model

PROMPT = "The quick brown fox jumps over 13 lazy dogs, and nobody knows why. " * 5


@pytest.fixture(scope="module", params=ARCHITECTURES)
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    """The small model of each architecture."""
    return load_model(str(tiny_model(request.param)), "cpu")


def test_greedy_output_is_varied_and_decided_by_clear_margins(loaded: LoadedModel) -> None:
    ids = loaded.tokenizer(PROMPT, return_tensors="pt").input_ids
    output = loaded.model.generate(
        ids, max_new_tokens=32, do_sample=False, eos_token_id=None, output_logits=True, return_dict_in_generate=True
    )
    assert len(set(output.sequences[0, ids.shape[1] :].tolist())) >= 16
    best = torch.cat(output.logits).topk(2).values
    gaps = best[:, 0] - best[:, 1]
    assert gaps.median() > 0.1
    assert (gaps < 1e-3).sum() <= 1


def test_what_lies_in_the_cache_decides_the_output(loaded: LoadedModel) -> None:
    # A model that only looked at the last token would hide every fault in a cache.
    ids = loaded.tokenizer(PROMPT, return_tensors="pt").input_ids
    # Within every sliding window.
    changed = ids.clone()
    changed[0, -20:-10] = torch.arange(1000, 1010)
    logits, others = (loaded.model(prompt).logits[0, -1] for prompt in (ids, changed))
    assert (logits - others).norm() > 0.02 * logits.norm()


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    again = load_file(build_tiny_model("qwen3", tmp_path) / "model.safetensors")
    kept = load_file(tiny_model("qwen3") / "model.safetensors")
    assert again.keys() == kept.keys()
    assert all(torch.equal(again[name], kept[name]) for name in kept)


def test_key_biases_hold_an_outlier() -> None:
    weights = load_file(tiny_model("qwen2") / "model.safetensors")
    biases = [weights[f"model.layers.{layer}.self_attn.k_proj.bias"] for layer in range(2)]
    assert biases[0].abs().max() == 60
    assert all(bias.abs().min() > 0 for bias in biases)
