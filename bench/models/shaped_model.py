"""Write models with the shape of well-known ones and random weights, to measure speed without their weights."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, MistralConfig, PretrainedConfig

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.model.cache import build_once, cache_directory
from spectrumkv.common.model.embedded import TOKENIZER_FILES, check_model_files, embedded_model_directory

# The embedded model's tokenizer has more tokens than Mistral's.
VOCABULARY = 49152
# Increase this when a change writes another model than before.
BUILD = 1


def _mistral_7b() -> PretrainedConfig:
    """Return Mistral 7B's configuration (arXiv 2310.06825, table 1), like later versions without a sliding window."""
    return MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=32768,
        sliding_window=None,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    )


def _tiny() -> PretrainedConfig:
    """Return the configuration of a model that runs anywhere in milliseconds, to try what serves the other shapes."""
    return MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        sliding_window=None,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )


SHAPES: dict[str, Callable[[], PretrainedConfig]] = {"mistral-7b": _mistral_7b, "tiny": _tiny}


def write_shaped_model(shape: str, directory: Path) -> None:
    """Write a model in bfloat16, made on a GPU if there is one.

    Args:
        shape: a name in `SHAPES`.
        directory: the directory to create; it must not exist.

    Raises:
        InvalidArgumentError: the shape is unknown, or the directory exists.
    """
    configuration = _configuration(shape)
    try:
        directory.mkdir(parents=True)
    except FileExistsError:
        raise InvalidArgumentError(f"{directory} exists; name a directory that does not") from None
    _write(configuration, directory)


def shaped_model_directory(shape: str) -> Path:
    """Return the directory of a model in the cache directory; the first call writes it.

    Args:
        shape: a name in `SHAPES`.

    Raises:
        InvalidArgumentError: the shape is unknown.
        FailedPreconditionError: the cache directory cannot be written to.
    """
    configuration = _configuration(shape)
    directory = cache_directory() / "models" / f"shaped-{shape}-{BUILD}"
    return build_once(
        directory, f"a model shaped like {shape}", lambda partial: _write(configuration, partial), check_model_files
    )


def _configuration(shape: str) -> PretrainedConfig:
    if shape not in SHAPES:
        raise InvalidArgumentError(f"unknown shape {shape!r}; allowed: {', '.join(SHAPES)}")
    return SHAPES[shape]()


def _write(configuration: PretrainedConfig, directory: Path) -> None:
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(configuration, dtype=torch.bfloat16)
    # One file, as the check of models in the cache expects.
    model.save_pretrained(directory, max_shard_size="1TB")
    copy_tokenizer(directory)


def copy_tokenizer(directory: Path) -> None:
    """Give a model in `directory` the default model's tokenizer and chat template.

    Raises:
        FailedPreconditionError: see `embedded_model_directory`.
    """
    source = embedded_model_directory()
    for file in TOKENIZER_FILES:
        shutil.copy(source / file, directory)
