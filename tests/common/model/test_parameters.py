"""Two models that compute differently are told apart by name; two spellings of one model are not."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from spectrumkv.common.model.load import LoadedModel, load_model
from spectrumkv.common.model.parameters import model_parameters
from spectrumkv.common.model.spec import ModelSpec
from tests.tiny_models import ARCHITECTURES, tiny_model

# What no forward pass reads, or what other fields of the spec and the list of each layer's attention stand for.
ELSEWHERE = {
    # Other fields of the spec.
    "model_type", "architectures", "vocab_size", "num_hidden_layers", "num_key_value_heads", "head_dim", "dtype",
    "max_position_embeddings",
    # They become `sliding_window`, `sliding_layers`, `rope_…` and `hidden_act`.
    "layer_types", "use_sliding_window", "max_window_layers", "rope_parameters", "hidden_activation",
    "_sliding_window_pattern",
    # Models for which these matter are refused.
    "is_encoder_decoder", "use_bidirectional_attention",
    # Read in training, in beam search, or by nothing.
    "initializer_range", "attention_dropout", "pretraining_tp", "use_cache", "bos_token_id", "pad_token_id",
    "transformers_version", "chunk_size_feed_forward", "id2label", "label2id", "output_attentions",
    "output_hidden_states", "problem_type", "return_dict", "_name_or_path", "cross_attention_hidden_size",
}  # fmt: skip


def edited(directory: Path, architecture: str, **changes: object) -> Path:
    """Return a tiny model in `directory` whose configuration is changed; ... removes a field."""
    copy = Path(shutil.copytree(tiny_model(architecture), directory))
    for name in ("config.json", "generation_config.json"):
        content = json.loads((copy / name).read_text())
        known = changes if name == "config.json" else {key: changes[key] for key in changes if key == "eos_token_id"}
        content = {key: value for key, value in (content | known).items() if value is not ...}
        (copy / name).write_text(json.dumps(content))
    return copy


def differences(mine: ModelSpec, directory: Path) -> dict[str, tuple[Any, Any]]:
    return {one.field: (one.mine, one.theirs) for one in mine.differences(load_model(str(directory), "cpu").spec)}


@pytest.mark.parametrize(
    ("architecture", "changes", "expected"),
    [
        ("mistral", {"sliding_window": 48}, {"sliding_window": ("32", "48")}),
        ("mistral", {"sliding_window": None}, {"sliding_window": ("32", "none"), "sliding_layers": ("all", "none")}),
        ("gemma2", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
         {"sliding_layers": ("0,2", "1")}),
        ("gemma2", {"attn_logit_softcapping": 6.5}, {"attn_logit_softcapping": ("5", "6.5")}),
        ("gemma2", {"final_logit_softcapping": None}, {"final_logit_softcapping": ("20", "none")}),
        ("gemma2", {"query_pre_attn_scalar": 256}, {"query_pre_attn_scalar": ("144", "256")}),
        ("gemma2", {"hidden_activation": "silu"}, {"hidden_act": ("gelu_pytorch_tanh", "silu")}),
        ("llama", {"rms_norm_eps": 1e-5}, {"rms_norm_eps": ("1e-06", "1e-05")}),
        ("llama", {"hidden_act": "gelu"}, {"hidden_act": ("silu", "gelu")}),
        ("llama", {"eos_token_id": [2, 7]}, {"eos_token_id": ("2", "2,7")}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1, "layer_types": ...},
         {"sliding_window": ("none", "16"), "sliding_layers": ("none", "1")}),
    ],
)  # fmt: skip
def test_what_a_model_computes_with_is_compared_by_name(
    tmp_path: Path, architecture: str, changes: dict[str, object], expected: dict[str, tuple[str, str]]
) -> None:
    mine = load_model(str(tiny_model(architecture)), "cpu").spec
    assert differences(mine, edited(tmp_path / "other", architecture, **changes)) == expected


def test_a_rotary_embedding_is_compared_by_name(tmp_path: Path) -> None:
    mine = load_model(str(tiny_model("llama")), "cpu").spec
    other = edited(tmp_path / "other", "llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    found = differences(mine, other)
    assert found.keys() == {"rope_digest", "rope_theta"}
    assert found["rope_theta"] == ("10000", "500000")


def test_rotary_embeddings_of_different_layers_are_compared_by_name(tmp_path: Path) -> None:
    mine = load_model(str(tiny_model("gemma3_text")), "cpu").spec
    ropes = {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    found = differences(mine, edited(tmp_path / "other", "gemma3_text", rope_parameters=ropes))
    assert {name: pair for name, pair in found.items() if name != "rope_digest"} == {
        "full_attention_rope_factor": ("8", "4"),
        "sliding_attention_rope_theta": ("10000", "20000"),
    }
    assert "rope_digest" in found


DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 512}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"rope_parameters": {"rope_type": "default", "rope_theta": 10000}}),
        ({}, {"rope_parameters": {"type": "default", "rope_theta": 10000.0}}),
        ({}, {"rope_parameters": ..., "rope_theta": 10000.0}),
        ({}, {"rope_parameters": DEFAULT_ROPE | {"factor": None}}),
        ({}, {"rope_parameters": ..., "rope_scaling": None, "rope_theta": 10000}),
        ({}, {"attention_bias": ..., "mlp_bias": ..., "head_dim": 64, "pretraining_tp": ...}),
        ({}, {"hidden_act": "swish"}),
        ({}, {"initializer_range": 0.5, "use_cache": False}),
        ({"rope_parameters": YARN}, {"rope_parameters": YARN | {"beta_fast": 32, "beta_slow": 1.0}}),
        ({"rope_parameters": YARN}, {"rope_parameters": YARN | {"factor": 4, "truncate": True}}),
        ({"rope_parameters": YARN}, {"rope_parameters": YARN | {"attention_factor": 1.1386294361119891}}),
        ({"rope_parameters": YARN}, {"rope_parameters": ..., "rope_theta": 10000.0,
          "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}}),
    ],
)  # fmt: skip
def test_spellings_of_one_model_are_the_same(
    tmp_path: Path, one: dict[str, object], other: dict[str, object]
) -> None:
    mine = load_model(str(edited(tmp_path / "one", "llama", **one)), "cpu").spec
    assert differences(mine, edited(tmp_path / "other", "llama", **other)) == {}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_field_of_a_configuration_is_compared_or_known_not_to_matter(architecture: str) -> None:
    config = AutoConfig.from_pretrained(tiny_model(architecture))
    compared = set(model_parameters(config, [2]))
    assert set(config.to_dict()) - compared - ELSEWHERE == set()


def test_parameters_survive_the_wire(loaded: LoadedModel) -> None:
    assert loaded.spec.parameters
    assert ModelSpec.from_proto(loaded.spec.to_proto()) == loaded.spec
    json.dumps(asdict(loaded.spec))


@pytest.mark.parametrize("in_place", [False, True])
def test_weights_of_the_same_name_size_and_time_are_others(tmp_path: Path, in_place: bool) -> None:
    copy = edited(tmp_path / "model", "llama")
    mine = load_model(str(copy), "cpu").spec
    file = copy / "model.safetensors"
    before, weights = file.stat(), load_file(file)
    weights["model.norm.weight"] = weights["model.norm.weight"] * 2
    replacement = copy / "replacement"
    save_file(weights, replacement, metadata={"format": "pt"})
    if in_place:
        # Only the time at which the inode changed tells.
        file.write_bytes(replacement.read_bytes())
        replacement.unlink()
        assert file.stat().st_ino == before.st_ino
    else:
        os.replace(replacement, file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert differences(mine, copy).keys() == {"weights_digest"}


def test_weights_without_the_prefix_of_the_lower_part_are_digested(tmp_path: Path) -> None:
    digests = []
    for factor in (1, 2):
        copy = edited(tmp_path / str(factor), "llama")
        weights = {name.removeprefix("model."): one for name, one in load_file(copy / "model.safetensors").items()}
        weights["norm.weight"] = weights["norm.weight"] * factor
        save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
        digests.append(load_model(str(copy), "cpu").spec.weights_digest)
    assert digests[0] != digests[1]


def test_a_tensor_that_the_model_does_not_have_does_not_matter(tmp_path: Path) -> None:
    copy = edited(tmp_path / "model", "llama")
    mine = load_model(str(tiny_model("llama")), "cpu").spec
    file = copy / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = weights["model.norm.weight"].clone()
    save_file(weights, file, metadata={"format": "pt"})
    assert differences(mine, copy) == {}
