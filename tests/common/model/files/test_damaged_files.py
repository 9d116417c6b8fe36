"""Whatever stands in a model's files, it loads, or the refusal says file, field, value, what is allowed and a remedy.

Where a library finds the fault, its own text is passed on behind the file's name: of a text that is no JSON or no
UTF-8 (it says the place), of generation settings that only transformers knows (it says the field), of numbers of
layers (it says both fields and values), and of a section of tokenizer.json (the section's name and value are ours).
Weights that do not fit their configuration are refused with the tensors' names and shapes: nobody can know which
field is wrong. What no computation here reads may hold anything.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from spectrumkv.common.errors import FailedPreconditionError
from spectrumkv.common.model.files.directory import refuse_damage
from spectrumkv.common.model.load import load_model
from spectrumkv.common.model.spec import ModelSpec
from tests.common.model.files.damaged_fields import (
    BY_LAYER_TYPE,
    BY_LAYER_TYPE_LOADS,
    CONFIG,
    CONFIG_LOADS,
    GENERATION,
    GENERATION_LOADS,
    TOKENIZER,
    TOKENIZER_CONFIG,
    TOKENIZER_CONFIG_LOADS,
    Case,
)
from tests.tiny_models import tiny_model

# The longest refusal lists the functions that hidden_act may name.
LONGEST = 800


def copy_of(architecture: str, directory: Path) -> Path:
    """Copy a tiny model but for its weights, which are a link: hundreds of copies would fill a disk."""

    def copy_or_link(source: str, target: str) -> None:
        (os.symlink if source.endswith(".safetensors") else shutil.copyfile)(source, target)

    return Path(shutil.copytree(tiny_model(architecture), directory, copy_function=copy_or_link))


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A tiny llama to damage."""
    return copy_of("llama", tmp_path / "copied")


def runs(directory: Path) -> bool:
    """Load the model and run it: whether its logits are numbers."""
    return bool(load_model(str(directory), "cpu").model(torch.tensor([[20, 21, 22]])).logits.isfinite().all())


def refuses(directory: Path, case: Case, file: str = "") -> None:
    """Hold the refusal of a damaged file to one line with its name, what the case names, and what to do."""
    with pytest.raises(FailedPreconditionError) as refused:
        load_model(str(directory), "cpu")
    refusal = refused.value.message
    assert [part for part in (file, *case.says) if part not in refusal] == [], refusal
    assert re.search(r"config\.json|tokenizer\.json|this model cannot be served", refusal), refusal
    assert re.search(r"correct|fetch|supported|use the|give |only ", refusal), refusal
    assert "\n" not in refusal
    assert len(refusal) < LONGEST, refusal


def written_over(file: Path, content: Any) -> None:
    """Put fields over those of a JSON file, or a text in the place of all of it."""
    if isinstance(content, dict):
        content = json.dumps(json.loads(file.read_text()) | content)
    file.write_text(content, encoding="latin-1")


def in_turn(listed: Sequence[Any]) -> list[Any]:
    """Every fourth is a test of every change, the others are slow ones."""
    return [pytest.param(one, marks=[pytest.mark.slow] if place % 4 else []) for place, one in enumerate(listed)]


def label(value: Any) -> str:
    """What a report calls a case."""
    return json.dumps(value.content if isinstance(value, Case) else value)[:90]


@pytest.mark.parametrize("case", in_turn(CONFIG), ids=label)
def test_a_field_of_the_configuration(copied: Path, case: Case) -> None:
    if "eos_token_id" in case.content:
        (copied / "generation_config.json").unlink()
    written_over(copied / "config.json", case.content)
    refuses(copied, case)


@pytest.fixture
def by_layer_type(tmp_path: Path) -> Path:
    """A tiny gemma3 to damage."""
    return copy_of("gemma3_text", tmp_path / "copied")


@pytest.mark.parametrize("case", in_turn(BY_LAYER_TYPE), ids=label)
def test_a_field_that_belongs_to_types_of_layers(by_layer_type: Path, case: Case) -> None:
    written_over(by_layer_type / "config.json", case.content)
    refuses(by_layer_type, case)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "changes"),
    [*(("llama", one) for one in CONFIG_LOADS), *(("gemma3_text", one) for one in BY_LAYER_TYPE_LOADS)],
    ids=label,
)
def test_what_a_configuration_may_hold(tmp_path: Path, architecture: str, changes: dict[str, object]) -> None:
    directory = copy_of(architecture, tmp_path / "copied")
    written_over(directory / "config.json", changes)
    assert runs(directory)


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
        directory = copy_of(architecture, tmp_path / name)
        written_over(directory / "config.json", fields)
        return load_model(str(directory), "cpu").spec

    assert spec_with("whole", changes) == spec_with("fractions", as_fractions(changes))


def as_fractions(value: Any) -> Any:
    """The same with each whole number written as a fraction, such as 1.0."""
    if isinstance(value, dict):
        return {name: as_fractions(one) for name, one in value.items()}
    return float(value) if isinstance(value, int) else value


@pytest.mark.slow
@pytest.mark.parametrize("case", GENERATION, ids=label)
def test_a_generation_configuration(copied: Path, case: Case) -> None:
    written_over(copied / "generation_config.json", case.content)
    refuses(copied, case, "cannot read generation_config.json")


@pytest.mark.parametrize("case", in_turn(TOKENIZER_CONFIG), ids=label)
def test_a_tokenizers_configuration(copied: Path, case: Case) -> None:
    written_over(copied / "tokenizer_config.json", case.content)
    refuses(copied, case, "cannot read tokenizer_config.json")


@pytest.mark.slow
@pytest.mark.parametrize("case", TOKENIZER, ids=label)
def test_a_tokenizer(copied: Path, case: Case) -> None:
    written_over(copied / "tokenizer.json", case.content)
    refuses(copied, case, "cannot read tokenizer.json")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "changes"),
    [
        *(("generation_config.json", one) for one in GENERATION_LOADS),
        *(("tokenizer_config.json", one) for one in TOKENIZER_CONFIG_LOADS),
    ],
    ids=label,
)
def test_what_is_not_read_may_be_anything(copied: Path, file: str, changes: dict[str, object]) -> None:
    written_over(copied / file, changes)
    assert runs(copied)


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
