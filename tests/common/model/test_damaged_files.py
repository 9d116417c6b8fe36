"""Whatever stands in a model's files, it loads or is refused in a sentence that names the file."""

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from spectrumkv.common.errors import FailedPreconditionError
from spectrumkv.common.model.directory import refuse_damage
from spectrumkv.common.model.load import load_model
from spectrumkv.common.model.spec import ModelSpec
from tests.tiny_models import tiny_model

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
CONFIG = [
    *({name: value} for name in ("num_attention_heads", "num_hidden_layers", "hidden_size", "num_key_value_heads")
      for value in (0, -1, 2.5, "4", [], 10**30)),
    *({name: value} for name in ("vocab_size", "intermediate_size", "max_position_embeddings", "head_dim")
      for value in (0, -3, "x", {}, True)),
    *({"rms_norm_eps": value} for value in (1, 0, -1e-6, "1e-6", [], float("nan"), float("inf"), 10**400)),
    *({"dtype": value} for value in ("float99", 16, [], "int8", "layers")),
    *({"rope_parameters": value} for value in (
        [], 3, "default", {}, {"rope_type": 7}, {"rope_type": []}, {"full_attention": ROPE},
        *(ROPE | {"rope_theta": value} for value in (0, "x", None, float("nan"))),
        *({"rope_type": "linear", "rope_theta": 1e4} | more for more in ({}, {"factor": 0}, {"factor": "x"})),
        *({"rope_type": "yarn", "rope_theta": 1e4} | more for more in ({}, {"factor": []}, {"factor": -1.0})),
        {"rope_type": "llama3", "rope_theta": 1e4})),
    *({"hidden_act": value} for value in ("no-such-function", 3, None, [])),
    *({"architectures": value} for value in (3, [3], "LlamaForCausalLM", ["NoSuchModel"], {})),
    *({"eos_token_id": value} for value in ("2", 2.0, [[2]], {"a": 1}, -1, 10**9)),
    {"model_type": 3}, {"model_type": None}, {"model_type": "gemma2"}, {"attention_bias": "yes"},
    {"quantization_config": 3}, {"quantization_config": {}}, {"tie_word_embeddings": "no"},
    {"num_key_value_heads": 3},
    {"auto_map": {"AutoConfig": "code.Config"}}, {"pad_token_id": "x"}, {"bos_token_id": []}, {"use_cache": 7},
    {"attention_dropout": "x"}, {"is_encoder_decoder": True}, {"transformers_version": 5}, {"pretraining_tp": "x"},
]  # fmt: skip
# What only models with a rotary embedding for each type of layer have.
BY_LAYER_TYPE = [
    *({"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE} | {name: value}}
      for name in ("full_attention", "sliding_attention")
      for value in (3, [], "default", {"rope_type": 7}, ROPE | {"rope_theta": 0}, ROPE | {"rope_type": "dynamic"},
                    {"rope_type": "linear", "rope_theta": 1e4, "factor": -1.0}, None)),
    *({"layer_types": value} for value in (3, "sliding_attention", [3] * 4, [[]] * 4, ["full_attention"], [])),
    *({"rope_parameters": value} for value in (3, [], ROPE, {})),
    *({"sliding_window": value} for value in (0, None, "x")),
    {"query_pre_attn_scalar": 0}, {"attn_logit_softcapping": 30.0}, {"final_logit_softcapping": 0},
    {"use_bidirectional_attention": True}, {"hidden_activation": "no-such-function"}, {"rope_local_base_freq": 0},
]  # fmt: skip
GENERATION = ["[]", "3", "null", "", "{", '{"eos_token_id": "2"}', '{"eos_token_id": [null]}', '{"eos_token_id": {}}',
              '{"eos_token_id": true}', '{"temperature": "hot"}', '{"max_length": []}', '{"cache_implementation": 7}',
              '{"do_sample": 3, "num_beams": "x"}', '{"compile_config": 3}', "\0\0\0\0"]  # fmt: skip
TOKENIZER_CONFIG = ["[]", "3", "null", "", "{", '{"tokenizer_class": "NoSuchTokenizer"}', '{"tokenizer_class": 3}',
                    '{"tokenizer_class": []}', '{"eos_token": 3}', '{"eos_token": []}',
                    '{"added_tokens_decoder": []}',
                    '{"added_tokens_decoder": {"x": 3}}', '{"added_tokens_decoder": {"5": {"content": 3}}}',
                    '{"model_max_length": "x"}', '{"chat_template": 3}', '{"extra_special_tokens": 3}',
                    '{"auto_map": 3}', "\xff"]  # fmt: skip
TOKENIZER = ["[]", "3", "null", "", "{", "{}", '{"model": 3}', '{"model": {"type": "OfTomorrow"}}',
             '{"model": {"type": "BPE"}}', '{"version": "9.0"}',
             '{"model": {"type": "BPE", "vocab": [], "merges": 3}}',
             '{"pre_tokenizer": {"type": "OfTomorrow"}}', '{"decoder": {"type": 3}}', '{"added_tokens": {}}',
             '{"normalizer": []}', "\0"]  # fmt: skip


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A tiny llama to damage."""
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "copied"))


def loads_or_names(directory: Path, files: str) -> None:
    """Load the model and run it, or hold the refusal to name one of the files and a remedy in one line."""
    try:
        loaded = load_model(str(directory), "cpu")
    except FailedPreconditionError as error:
        refusal = error.message
    else:
        assert loaded.model(torch.tensor([[20, 21, 22]])).logits.isfinite().all()
        return
    assert re.search(files, refusal), refusal
    assert re.search(r"correct|fetch|supported|save it|belong together|use |only ", refusal), refusal
    assert "\n" not in refusal


def written_over(file: Path, content: str) -> None:
    """Put an object's fields over those of a JSON file; any other content replaces the file's."""
    try:
        fields = json.loads(content)
    except ValueError:
        fields = None
    if isinstance(fields, dict) and fields:
        content = json.dumps(json.loads(file.read_text()) | fields)
    file.write_text(content, encoding="latin-1")


@pytest.mark.parametrize(
    "changes",
    [pytest.param(one, marks=[pytest.mark.slow] if place % 4 else []) for place, one in enumerate(CONFIG)],
    ids=lambda changes: json.dumps(changes)[:60],
)
def test_a_field_of_the_configuration(copied: Path, changes: dict[str, object]) -> None:
    if changes.keys() == {"eos_token_id"}:
        (copied / "generation_config.json").unlink()
    written_over(copied / "config.json", json.dumps(changes))
    loads_or_names(copied, r"config\.json|this model cannot be served")


@pytest.mark.parametrize(
    "changes",
    [pytest.param(one, marks=[pytest.mark.slow] if place % 4 else []) for place, one in enumerate(BY_LAYER_TYPE)],
    ids=lambda changes: json.dumps(changes)[:90],
)
def test_a_field_that_belongs_to_types_of_layers(tmp_path: Path, changes: dict[str, object]) -> None:
    directory = Path(shutil.copytree(tiny_model("gemma3_text"), tmp_path / "copied"))
    written_over(directory / "config.json", json.dumps(changes))
    loads_or_names(directory, r"config\.json|this model cannot be served")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {"rms_norm_eps": 1, "initializer_range": 0, "attention_dropout": 0}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000, "factor": 2}}),
        ("qwen2", {"rms_norm_eps": 1}),
        ("qwen3", {"rms_norm_eps": 1}),
        ("mistral", {"rms_norm_eps": 1}),
        ("gemma2", {"rms_norm_eps": 1, "attn_logit_softcapping": 50, "final_logit_softcapping": 30}),
        ("gemma3_text", {"final_logit_softcapping": 30, "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1000000, "factor": 8},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000}}}),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)  # fmt: skip
def test_a_whole_number_stands_for_the_same_fraction(
    tmp_path: Path, architecture: str, changes: dict[str, object]
) -> None:
    def spec_with(name: str, fields: dict[str, object]) -> ModelSpec:
        directory = Path(shutil.copytree(tiny_model(architecture), tmp_path / name))
        written_over(directory / "config.json", json.dumps(fields))
        return load_model(str(directory), "cpu").spec

    assert spec_with("whole", changes) == spec_with("fractions", as_fractions(changes))


def as_fractions(value: Any) -> Any:
    """The same with each whole number written as a fraction, such as 1.0."""
    if isinstance(value, dict):
        return {name: as_fractions(one) for name, one in value.items()}
    return float(value) if isinstance(value, int) else value


@pytest.mark.slow
@pytest.mark.parametrize("content", GENERATION)
def test_a_generation_configuration(copied: Path, content: str) -> None:
    written_over(copied / "generation_config.json", content)
    loads_or_names(copied, r"generation_config\.json")


@pytest.mark.parametrize("content", TOKENIZER_CONFIG)
def test_a_tokenizers_configuration(copied: Path, content: str) -> None:
    written_over(copied / "tokenizer_config.json", content)
    loads_or_names(copied, r"tokenizer_config\.json|the tokenizer in .*copied")


@pytest.mark.slow
@pytest.mark.parametrize("content", TOKENIZER)
def test_a_tokenizer(copied: Path, content: str) -> None:
    written_over(copied / "tokenizer.json", content)
    loads_or_names(copied, r"tokenizer\.json|the tokenizer in .*copied")


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (MemoryError(), "give the service more memory"),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "give the service more memory"),
        (RuntimeError(f"unable to mmap 8 bytes: {os.strerror(errno.ENOMEM)} (12)"), "give the service more memory"),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "ulimit -n"),
        (RuntimeError(f"unable to open: {os.strerror(errno.ENFILE)} (23)"), "fs.file-max"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES)), "let this process's user read it"),
        (RuntimeError("unexpected end"), "correct it or fetch the model again"),
    ],
    ids=repr,
)
def test_what_a_sound_file_is_not_to_blame_for(error: Exception, remedy: str) -> None:
    with (
        pytest.raises(FailedPreconditionError, match=rf"cannot read the weights: .+; .*{remedy}"),
        refuse_damage("the weights"),
    ):
        raise error
