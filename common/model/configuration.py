"""Reads a model's configuration, and refuses values that no model can have.

transformers takes much of config.json as it comes, and fails later or not at all: at the first forward pass, or with
an answer that is wrong.
"""

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from spectrumkv.common.errors import FailedPreconditionError
from spectrumkv.common.files import read_text
from spectrumkv.common.model.directory import refuse_damage
from spectrumkv.common.model.support import check_supported, rotary_embeddings

CONFIGURATION = "config.json"
GENERATION = "generation_config.json"

_COUNTS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "sliding_window",
)
# Null stands for a value that follows from others, or for none.
_MAY_BE_NULL = ("num_key_value_heads", "head_dim", "sliding_window")
_POSITIVE = ("rms_norm_eps", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")
_ROPE_POSITIVE = ("rope_theta", "factor", "original_max_position_embeddings", "attention_factor")
_MOST, _LARGEST = 1 << 31, 1e38


def read_config(directory: Path) -> PretrainedConfig:
    """Read config.json, and check that the model can be served.

    Args:
        directory: the model's.

    Returns:
        The configuration of a supported model.

    Raises:
        FailedPreconditionError: the file cannot be read or holds a value that no model has, and the message names
            both; or the model cannot be served.
    """
    file = directory / CONFIGURATION
    given = read_object(file)
    _refuse(file, _wrong_numbers(given))
    with refuse_damage(f"config.json of the model in {directory}"):
        config: PretrainedConfig = AutoConfig.for_model(**_with_fractions(given))
        check_supported(config)
        _refuse(file, _contradictions(config))
    return config


def eos_token_ids(directory: Path, config: PretrainedConfig, of_tokenizer: int | None) -> frozenset[int]:
    """Return the tokens that end a generation.

    Args:
        directory: the model's; its generation_config.json comes before config.json.
        config: the model's.
        of_tokenizer: the token that the tokenizer ends a text with, if it has one.

    Raises:
        FailedPreconditionError: the file cannot be read, or what it names are no tokens.
    """
    file = directory / GENERATION
    given = getattr(config, "eos_token_id", None)
    if file.exists():
        given = read_object(file).get("eos_token_id")
        with refuse_damage(f"{GENERATION} of the model in {directory}"):
            GenerationConfig.from_pretrained(directory, local_files_only=True)
    else:
        file = directory / CONFIGURATION
    listed = given if isinstance(given, list) else [] if given is None else [given]
    if not all(isinstance(one, int) and not isinstance(one, bool) for one in listed):
        _refuse(file, [f"eos_token_id is {_shown(given)}, and it must be a token id or a list of them"])
    return frozenset(one for one in (*listed, of_tokenizer) if one is not None)


def read_object(file: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Args:
        file: its path.

    Returns:
        The object.

    Raises:
        FailedPreconditionError: the file cannot be read, or holds something else.
    """
    with refuse_damage(f"{file.name} of the model in {file.parent}"):
        found = json.loads(read_text(file))
        if not isinstance(found, dict):
            raise FailedPreconditionError(
                f"cannot read {file.name} of the model in {file.parent}: it holds {_shown(found)} instead of an "
                "object in braces; correct it or fetch the model again"
            )
        return found


def _refuse(file: Path, reasons: "Iterator[str] | list[str]") -> None:
    if listed := "; ".join(reasons):
        raise FailedPreconditionError(
            f"cannot read {file.name} of the model in {file.parent}: {listed}; correct it or fetch the model again"
        )


def _with_fractions(given: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration with 1.0 for 1 where transformers wants a fraction: it refuses 1, which equals it.

    Raises:
        ValueError: the type of the model is none that transformers knows.
    """
    kind = given.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"model_type is {_shown(kind)}, and transformers knows no such model")
    fractions = {field.name for field in fields(CONFIG_MAPPING[kind]) if field.type in (float, float | None)}
    whole = {name: value for name, value in given.items() if name in fractions and type(value) is int}
    return given | {name: float(value) for name, value in whole.items()}


def _wrong_numbers(given: dict[str, Any]) -> Iterator[str]:
    for name in _COUNTS:
        value = given.get(name)
        absent = name not in given or (value is None and name in _MAY_BE_NULL)
        if not absent and not (type(value) is int and 1 <= value < _MOST):
            yield f"{name} is {_shown(value)}, and it must be a whole number from 1 to {_MOST - 1}"
    for name in _POSITIVE:
        value = given.get(name)
        if value is not None and not _is_positive(value):
            yield f"{name} is {_shown(value)}, and it must be a number above 0"
    names = given.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        yield f"architectures is {_shown(names)}, and it must be a list of names"


def _contradictions(config: PretrainedConfig) -> Iterator[str]:
    heads, kv_heads = getattr(config, "num_attention_heads", 1), getattr(config, "num_key_value_heads", 1)
    if heads % kv_heads:
        yield f"num_attention_heads is {heads}, and num_key_value_heads, {kv_heads}, must divide it"
    for rope in rotary_embeddings(config).values():
        for name in _ROPE_POSITIVE:
            if (value := rope.get(name)) is not None and not _is_positive(value):
                yield f"{name} of the rotary embedding is {_shown(value)}, and it must be a number above 0"


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < _LARGEST


def _shown(value: object) -> str:
    """Return a value of a JSON file as a sentence shows it."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
