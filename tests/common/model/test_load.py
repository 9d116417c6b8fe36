import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spectrumkv.common.errors import FailedPreconditionError, InvalidArgumentError
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.model.load import LoadedModel, choose_device, choose_dtype, load_model
from tests.tiny_models import CONTEXT_LENGTH, VOCABULARY, tiny_model

GEOMETRIES = {
    "llama": (3, 2, 64),
    "qwen2": (2, 2, 32),
    "qwen3": (2, 2, 128),
    "mistral": (2, 2, 80),
    "gemma2": (3, 2, 256),
    "gemma3_text": (4, 1, 256),
}


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A tiny llama to damage."""
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "copied"))


def edit_json(file: Path, **changes: object) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in (content | changes).items() if value is not ...}))


def test_geometry_is_that_of_the_cache(loaded: LoadedModel) -> None:
    layers, kv_heads, head_dim = GEOMETRIES[loaded.spec.architecture]
    assert loaded.geometry == KvGeometry(layers, kv_heads, head_dim, torch.float32)
    cache = loaded.model(torch.arange(20, 29)[None], use_cache=True).past_key_values
    assert len(cache.layers) == layers
    assert {tuple(layer.keys.shape) for layer in cache.layers} == {(1, kv_heads, 9, head_dim)}
    assert {layer.values.dtype for layer in cache.layers} == {loaded.geometry.native_dtype}


def test_model_is_ready_to_run(loaded: LoadedModel) -> None:
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert {parameter.device for parameter in loaded.model.parameters()} == {loaded.device}
    softcapped = loaded.spec.architecture == "gemma2"
    assert loaded.model.config._attn_implementation == ("eager" if softcapped else "sdpa")


def test_spec_describes_the_model(loaded: LoadedModel) -> None:
    spec = loaded.spec
    assert (spec.layers, spec.kv_heads, spec.head_dim) == GEOMETRIES[spec.architecture]
    assert (spec.dtype, spec.vocab_size) == ("float32", VOCABULARY)
    assert spec.context_length == loaded.context_length == CONTEXT_LENGTH
    assert loaded.eos_token_ids == {2}
    assert loaded.name == tiny_model(spec.architecture).name


def test_a_second_load_agrees_with_the_first(loaded: LoadedModel) -> None:
    assert load_model(str(tiny_model(loaded.spec.architecture)), "cpu").spec == loaded.spec


def test_architectures_disagree() -> None:
    mine, theirs = (load_model(str(tiny_model(name)), "cpu").spec for name in ("llama", "mistral"))
    fields = {one.field for one in mine.differences(theirs)}
    assert fields == {"architecture", "weights_digest", "layers", "head_dim", "rope_digest"} | {
        "attention_bias", "mlp_bias", "hidden_size", "num_attention_heads", "query_pre_attn_scalar",
        "sliding_layers", "sliding_window",
    }  # fmt: skip


def test_output_is_the_same_under_another_attention_implementation(loaded: LoadedModel) -> None:
    model, ids = loaded.model, torch.randint(17, VOCABULARY, (1, 70), generator=torch.Generator().manual_seed(1))
    before, loaded_with = model(ids).logits, model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        torch.testing.assert_close(model(ids).logits, before, atol=1e-3, rtol=0)
    finally:
        model.set_attn_implementation(loaded_with)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype_is_what_was_asked_for(dtype: str) -> None:
    model = load_model(str(tiny_model("llama")), "cpu", dtype)
    assert (model.dtype, model.geometry.native_dtype) == (getattr(torch, dtype),) * 2
    assert model.spec.dtype == dtype
    assert {one.field for one in load_model(str(tiny_model("llama")), "cpu").spec.differences(model.spec)} == {
        "dtype"
    }


def test_auto_dtype_is_float32_on_a_cpu_and_the_models_own_on_a_gpu() -> None:
    assert choose_dtype("auto", torch.device("cpu")) == torch.float32
    assert choose_dtype("auto", torch.device("cuda")) is None
    with pytest.raises(InvalidArgumentError, match="'int8'; allowed: auto, float32, float16, bfloat16"):
        choose_dtype("int8", torch.device("cpu"))


def test_device_is_chosen_by_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [choose_device(name).type for name in ("auto", "cuda", "cpu")] == ["cuda", "cuda", "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [choose_device(name).type for name in ("auto", "cpu")] == ["cpu", "cpu"]
    with pytest.raises(FailedPreconditionError, match="finds no GPU"):
        choose_device("cuda")
    with pytest.raises(InvalidArgumentError, match="'tpu'; allowed: auto, cpu, cuda"):
        choose_device("tpu")


def test_all_end_of_sequence_tokens_are_known(copied: Path) -> None:
    edit_json(copied / "generation_config.json", eos_token_id=[5, 9])
    assert load_model(str(copied), "cpu").eos_token_ids == {2, 5, 9}


def test_an_end_of_sequence_token_outside_the_vocabulary_is_refused(copied: Path) -> None:
    edit_json(copied / "generation_config.json", eos_token_id=[VOCABULARY])
    with pytest.raises(FailedPreconditionError, match=r"eos_token_id is \[49152\], .*from 0 to 49151"):
        load_model(str(copied), "cpu")


def test_weights_that_lack_a_tensor_are_refused(copied: Path) -> None:
    file = copied / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(FailedPreconditionError, match=r"missing keys model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(str(copied), "cpu")


def test_weights_of_another_shape_are_refused(copied: Path) -> None:
    edit_json(copied / "config.json", intermediate_size=64)
    refusal = (
        r"do not fit config\.json of a llama: mismatched keys model\.layers\.0\.mlp\.down_proj\.weight "
        r"\(the file has \[128, 128\], config\.json makes it \[128, 64\]\), .* and 6 more; "
        "correct model_type and sizes, or fetch the model again"
    )
    with pytest.raises(FailedPreconditionError, match=refusal):
        load_model(str(copied), "cpu")


def test_truncated_weights_are_refused(copied: Path) -> None:
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100_000])
    with pytest.raises(FailedPreconditionError, match=r"cannot read model\.safetensors of the model"):
        load_model(str(copied), "cpu")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model_type": "no-such-model"}'])
def test_a_broken_configuration_is_refused(copied: Path, content: str) -> None:
    (copied / "config.json").write_text(content)
    with pytest.raises(FailedPreconditionError, match=r"cannot read config\.json"):
        load_model(str(copied), "cpu")


def test_an_unsupported_model_is_refused_before_its_weights_are_read(copied: Path) -> None:
    edit_json(copied / "config.json", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    (copied / "model.safetensors").write_bytes(b"")
    with pytest.raises(FailedPreconditionError, match=r"'dynamic' \(rope_type\), supported are default"):
        load_model(str(copied), "cpu")


def test_a_tokenizer_of_another_model_is_refused(copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:49000].clone()
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    edit_json(copied / "config.json", vocab_size=49000)
    with pytest.raises(FailedPreconditionError, match="49152 tokens, the model 49000"):
        load_model(str(copied), "cpu")


def test_a_model_without_tokenizer_is_refused(copied: Path) -> None:
    for file in copied.glob("token*"):
        file.unlink()
    with pytest.raises(FailedPreconditionError, match="tokenizer"):
        load_model(str(copied), "cpu")


def test_descriptions_must_cover_all_layers(loaded: LoadedModel) -> None:
    with pytest.raises(InvalidArgumentError, match="descriptions for"):
        replace(loaded, attention=loaded.attention[:1])
