"""Reads a model's configuration, and refuses values that no model can have.

transformers takes much of config.json as it comes, and fails later or not at all: at the first forward pass, or with
an answer that is wrong.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
from transformers import AutoConfig, GenerationConfig, PretrainedConfig
from transformers.activations import ACT2FN
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from spectrumkv.common.errors import FailedPreconditionError
from spectrumkv.common.files import read_text
from spectrumkv.common.model.files.directory import refuse_damage
from spectrumkv.common.model.files.fields import (
    NOT_NEGATIVE,
    NULL,
    OBJECT,
    POSITIVE,
    TEXT,
    TRUTH,
    Allowed,
    either,
    list_of,
    misfits,
    of_type,
    one_of,
    shown,
    whole_number,
)
from spectrumkv.common.model.support import (
    LAYER_TYPES,
    SUPPORTED_MODEL_TYPES,
    SUPPORTED_ROPE_TYPES,
    check_supported,
    rotary_embeddings,
)

CONFIGURATION = "config.json"
GENERATION = "generation_config.json"

_COUNT = whole_number(1, (1 << 31) - 1)
_DTYPE = either(one_of("float32", "float16", "bfloat16", "float64"), NULL)
# Two names of the same, the second an older one.
_ROPES = ("rope_parameters", "rope_scaling")
# Null stands for a value that follows from others, or for none. Where transformers is stricter, its types decide.
_RULES: dict[str, Allowed] = {
    "hidden_size": _COUNT,
    "intermediate_size": _COUNT,
    "num_hidden_layers": _COUNT,
    "num_attention_heads": _COUNT,
    "num_key_value_heads": either(_COUNT, NULL),
    "head_dim": either(_COUNT, NULL),
    "vocab_size": _COUNT,
    "max_position_embeddings": _COUNT,
    "sliding_window": either(_COUNT, NULL),
    "rms_norm_eps": POSITIVE,
    "query_pre_attn_scalar": either(POSITIVE, NULL),
    "attn_logit_softcapping": either(POSITIVE, NULL),
    "final_logit_softcapping": either(POSITIVE, NULL),
    "architectures": either(list_of(TEXT), NULL),
    "dtype": _DTYPE,
    "torch_dtype": _DTYPE,
    "quantization_config": either(OBJECT, NULL),
    **dict.fromkeys(_ROPES, either(OBJECT, NULL)),
}
_ACTIVATION = one_of(*sorted(ACT2FN))
_ROPE_RULES: dict[str, Allowed] = {
    "rope_theta": POSITIVE,
    **{
        name: either(POSITIVE, NULL)
        for name in (
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "low_freq_factor",
            "high_freq_factor",
            "beta_fast",
            "beta_slow",
            "partial_rotary_factor",
        )
    },
    "mscale": either(NOT_NEGATIVE, NULL),
    "mscale_all_dim": either(NOT_NEGATIVE, NULL),
    "truncate": either(TRUTH, NULL),
}
# Which of them a type of rotary embedding cannot do without; null does for yarn's factor, which then follows.
_ROPE_NEEDED = {
    "linear": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


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
    refuse_fields(file, _wrong_fields(given))
    with refuse_damage(f"config.json of the model in {directory}"):
        config = _made_from(file, given)
        check_supported(config)
        refuse_fields(file, _contradictions(config))
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
    token = whole_number(0, config.vocab_size - 1)
    refuse_fields(file, misfits({"eos_token_id": given}, {"eos_token_id": either(token, NULL, list_of(token))}))
    listed = given if isinstance(given, list) else [given]
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
                f"cannot read {file.name} of the model in {file.parent}: it holds {shown(found)} instead of an "
                "object in braces; correct it or fetch the model again"
            )
        return found


def refuse_fields(file: Path, reasons: Iterable[str], cause: Exception | None = None) -> None:
    """Refuse a file for its fields.

    Args:
        file: its path.
        reasons: what is wrong, a sentence each; none is no reason to refuse it.
        cause: the error that the fields led to, if there was one.

    Raises:
        FailedPreconditionError: there is a reason.
    """
    if listed := "; ".join(reasons):
        raise FailedPreconditionError(
            f"cannot read {file.name} of the model in {file.parent}: {listed}; correct it or fetch the model again"
        ) from cause


def _with_fractions(given: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration with 1.0 for 1 where transformers wants a fraction: it refuses 1, which equals it."""
    declared = fields(CONFIG_MAPPING[given["model_type"]])
    fractions = {field.name for field in declared if field.type in (float, float | None)}
    whole = {name: value for name, value in given.items() if name in fractions and type(value) is int}
    return given | {name: float(value) for name, value in whole.items()}


def _made_from(file: Path, given: dict[str, Any]) -> PretrainedConfig:
    """Have transformers make the configuration; where it refuses, say which fields it does not take.

    Args:
        file: config.json.
        given: what it holds.

    Returns:
        The configuration.

    Raises:
        FailedPreconditionError: some fields are not of their declared types, or a rotary embedding lacks one.
    """
    try:
        config: PretrainedConfig = AutoConfig.for_model(**_with_fractions(given))
    except Exception as error:  # any type: each validator of transformers has its own
        kind = CONFIG_MAPPING[given["model_type"]]
        declared = {name: of_type(hint) for name, hint in get_type_hints(kind, localns={"torch": torch}).items()}
        refuse_fields(file, [*misfits(given, declared), *_rope_faults(given)], error)
        raise
    return config


def _wrong_fields(given: dict[str, Any]) -> Iterator[str]:
    kind = given.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        yield f"model_type is {shown(kind)}, and it must be one of {', '.join(SUPPORTED_MODEL_TYPES)}"
        return
    yield from misfits(given, _RULES)
    declared = {field.name for field in fields(CONFIG_MAPPING[kind])}
    yield from misfits(given, {name: _ACTIVATION for name in ("hidden_act", "hidden_activation") if name in declared})
    for name in _ROPES:
        if isinstance(ropes := given.get(name), dict):
            yield from misfits(ropes, dict.fromkeys(LAYER_TYPES, either(OBJECT, NULL)), f" of {name}")


def _rope_faults(given: dict[str, Any]) -> Iterator[str]:
    """Yield what keeps transformers from reading rotary embeddings as config.json gives them."""
    for name in _ROPES:
        ropes = given.get(name) or {}
        by_layer_type = [ropes[kind] or {} for kind in LAYER_TYPES if kind in ropes]
        for rope in by_layer_type or [ropes]:
            kind = rope.get("rope_type", rope.get("type", "default"))
            if kind not in SUPPORTED_ROPE_TYPES:
                yield f"rope_type of {name} is {shown(kind)}, and it must be one of {', '.join(SUPPORTED_ROPE_TYPES)}"
            elif missing := [one for one in _ROPE_NEEDED.get(kind, ()) if one not in rope]:
                yield f"{name} lacks {', '.join(missing)}, and with rope_type {kind} each must be {POSITIVE.words}"
            yield from misfits(rope, _ROPE_RULES, f" of {name}")


def _contradictions(config: PretrainedConfig) -> Iterator[str]:
    heads, kv_heads = getattr(config, "num_attention_heads", 1), getattr(config, "num_key_value_heads", 1)
    if heads % kv_heads:
        yield f"num_attention_heads is {heads}, and num_key_value_heads, {kv_heads}, must divide it"
    if (padding := getattr(config, "pad_token_id", None)) is not None and padding >= config.vocab_size:
        yield f"pad_token_id is {padding}, and it must be below vocab_size, {config.vocab_size}"
    for rope in rotary_embeddings(config).values():
        kind = rope["rope_type"]
        needed = {} if kind == "yarn" else dict.fromkeys(_ROPE_NEEDED.get(kind, ()), POSITIVE)
        yield from misfits(rope, _ROPE_RULES | needed, " of the rotary embedding")
