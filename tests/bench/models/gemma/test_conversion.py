from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

from spectrumkv.bench.models.gemma.conversion import convert
from spectrumkv.common.errors import FailedPreconditionError
from spectrumkv.common.model.load import load_model
from tests.bench.models.gemma.gguf_files import CONFIG, TOKENS, tiny_gemma, write_gguf


@pytest.fixture(scope="module")
def original() -> Gemma3ForCausalLM:
    return tiny_gemma()


def test_converted_weights_compute_the_same(original: Gemma3ForCausalLM, tmp_path: Path) -> None:
    convert(write_gguf(tmp_path / "model.gguf", original), tmp_path)
    converted, outcome = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(outcome.values())
    # Longer than the window, and 1 + weight − 1 is not weight to the last bit.
    ids = torch.arange(20)[None] * 7 % len(TOKENS)
    torch.testing.assert_close(converted(ids).logits, original(ids).logits, atol=1e-5, rtol=1e-5)


def test_the_configuration_has_what_the_file_leaves_out(original: Gemma3ForCausalLM, tmp_path: Path) -> None:
    convert(write_gguf(tmp_path / "model.gguf", original), tmp_path)
    config = Gemma3TextConfig.from_pretrained(tmp_path)
    assert config.dtype == torch.bfloat16
    for name in ("layer_types", "rope_parameters", "query_pre_attn_scalar", "sliding_window", "head_dim"):
        assert getattr(config, name) == getattr(CONFIG, name)
    assert [layer for layer, kind in enumerate(config.layer_types) if kind == "full_attention"] == [5, 11]


@pytest.mark.parametrize(("turn_end", "ends"), [(None, {1}), (7, {1, 7})])
def test_the_directory_is_a_model_that_is_served(
    original: Gemma3ForCausalLM, tmp_path: Path, turn_end: int | None, ends: set[int]
) -> None:
    convert(write_gguf(tmp_path / "model.gguf", original, turn_end=turn_end), tmp_path)
    loaded = load_model(str(tmp_path), "cpu")
    assert loaded.eos_token_ids == ends
    assert (loaded.geometry.kv_heads, loaded.geometry.head_dim, loaded.context_length) == (1, 24, 64)
    assert [layer.sliding_window for layer in loaded.attention] == [*([5] * 5 + [None]) * 2, 5]
    assert loaded.tokenizer("the").input_ids == [2, TOKENS.index("the")]


@pytest.mark.parametrize(
    ("damaged", "reason"),
    [
        (
            lambda file, model: write_gguf(file, model, architecture="gemma2"),
            "architecture is 'gemma2'; only 'gemma3'",
        ),
        (lambda file, model: write_gguf(file, model, tokenizer="gpt2"), "model is 'gpt2'; only 'llama'"),
        (lambda file, model: write_gguf(file, model, scaled=True), "scaling.type is 'linear'; only None"),
        (
            lambda file, model: write_gguf(file, model, leave_out="model.layers.1.mlp.up_proj.weight"),
            r"1 of the GGUF file's tensors are missing or unknown: model\.layers\.1\.mlp\.up_proj\.weight",
        ),
    ],
)
def test_a_file_that_cannot_be_converted_is_refused(
    damaged: Callable[[Path, Gemma3ForCausalLM], Path], reason: str, original: Gemma3ForCausalLM, tmp_path: Path
) -> None:
    with pytest.raises(FailedPreconditionError, match=reason):
        convert(damaged(tmp_path / "model.gguf", original), tmp_path)
