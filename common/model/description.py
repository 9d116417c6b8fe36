"""Describes a model: from its directory alone, or as it was loaded, to the same result."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from spectrumkv.common.errors import FailedPreconditionError
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.model.files.configuration import eos_token_ids, read_config
from spectrumkv.common.model.files.directory import refuse_damage, tokenizer_class
from spectrumkv.common.model.files.tokenizer import (
    TOKENIZER,
    TOKENIZER_CONFIG,
    check_tokenizer_config,
    refuse_tokenizer,
)
from spectrumkv.common.model.parameters import model_parameters
from spectrumkv.common.model.spec import ModelSpec, rope_digest, tokenizer_digest, weights_digest
from spectrumkv.common.model.support import head_dim


def spec_of_directory(directory: Path, dtype: torch.dtype) -> ModelSpec:
    """Describe the model in a directory as `load_model` does, without its weights in memory.

    Args:
        directory: the model's, complete; see `find_model`.
        dtype: that the model computes in.

    Returns:
        The spec.

    Raises:
        FailedPreconditionError: a file cannot be read, or the model cannot be served.
    """
    config = read_config(directory)
    tokenizer = read_tokenizer(directory, config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    digest = weights_digest(directory, names_in_files(model))
    eos = eos_token_ids(directory, config, tokenizer.eos_token_id)
    return describe(config, cache_geometry(config, dtype), digest, tokenizer, eos)


def cache_geometry(config: PretrainedConfig, dtype: torch.dtype) -> KvGeometry:
    """Return the shape of a model's KV cache.

    Args:
        config: of a supported model.
        dtype: that the model computes in.
    """
    return KvGeometry(config.num_hidden_layers, config.num_key_value_heads, head_dim(config), dtype)


def names_in_files(model: PreTrainedModel) -> set[str]:
    """Return the names that the model's tensors can have in files: with or without the prefix of its lower part.

    Args:
        model: of any device; only its names are looked at.
    """
    names, prefix = model.state_dict().keys(), f"{model.base_model_prefix}."
    return {*names, *(name.removeprefix(prefix) for name in names)}


def read_tokenizer(directory: Path, config: PretrainedConfig) -> PreTrainedTokenizerFast:
    """Read the tokenizer in a model's directory.

    Args:
        directory: the model's.
        config: the model's.

    Returns:
        The tokenizer.

    Raises:
        FailedPreconditionError: it cannot be read, is no fast tokenizer, or does not fit the model.
    """
    check_tokenizer_config(directory)
    with refuse_damage(f"the tokenizer of the model in {directory} ({TOKENIZER}, {TOKENIZER_CONFIG})"):
        try:
            tokenizer = tokenizer_class(directory).from_pretrained(directory, local_files_only=True)
        except Exception as error:  # any type: tokenizers raises Exception itself
            refuse_tokenizer(directory, error)
            raise
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise FailedPreconditionError(
            f"the tokenizer in {directory} is a {type(tokenizer).__name__} without tokenizer.json; "
            "save it with a tokenizer of the tokenizers library"
        )
    if len(tokenizer) > config.vocab_size:
        raise FailedPreconditionError(
            f"the tokenizer in {directory} has {len(tokenizer)} tokens, the model {config.vocab_size}; "
            "they do not belong together"
        )
    return tokenizer


def describe(
    config: PretrainedConfig,
    geometry: KvGeometry,
    digest: str,
    tokenizer: PreTrainedTokenizerFast,
    eos: frozenset[int],
) -> ModelSpec:
    """Gather what two processes must agree on.

    Args:
        config: of a supported model.
        geometry: shape and dtype of the model's cache.
        digest: of the weights.
        tokenizer: the model's.
        eos: tokens that end a generation.

    Returns:
        The spec.
    """
    return ModelSpec(
        architecture=config.model_type,
        weights_digest=digest,
        layers=geometry.layers,
        kv_heads=geometry.kv_heads,
        head_dim=geometry.head_dim,
        dtype=str(geometry.native_dtype).removeprefix("torch."),
        rope_digest=rope_digest(config, geometry.head_dim),
        tokenizer_digest=tokenizer_digest(tokenizer),
        vocab_size=config.vocab_size,
        context_length=config.max_position_embeddings,
        parameters=tuple(sorted(model_parameters(config, eos).items())),
    )
