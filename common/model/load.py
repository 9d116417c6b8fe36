"""Loads a model, and gathers what the services need to know about it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from spectrumkv.common.errors import FailedPreconditionError, InvalidArgumentError
from spectrumkv.common.generation.vocabulary import Vocabulary
from spectrumkv.common.kv.geometry import NATIVE_DTYPES, KvGeometry
from spectrumkv.common.model.description import cache_geometry, describe, names_in_files, read_tokenizer
from spectrumkv.common.model.files.configuration import eos_token_ids, read_config
from spectrumkv.common.model.files.directory import find_model, refuse_damage
from spectrumkv.common.model.files.footprint import check_weights_fit
from spectrumkv.common.model.packed_linear import can_pack, pack_linear_layers
from spectrumkv.common.model.spec import ModelSpec, weights_digest, weights_unchanged
from spectrumkv.common.model.support import LayerAttention, layer_attention

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in NATIVE_DTYPES}


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model ready to run, and its description.

    Attributes:
        model: in evaluation mode, without gradients, on `device`.
        tokenizer: backed by a `tokenizers.Tokenizer`.
        spec: what the other side must agree on.
        name: what clients call the model.
        device: where the weights are.
        dtype: what the model computes in.
        geometry: the shape of its KV cache.
        attention: how each layer attends, from the first to the last.
        eos_token_ids: any of these ends a generation.
        context_length: longest prompt plus completion in tokens.
    """

    model: PreTrainedModel = field(repr=False)
    tokenizer: PreTrainedTokenizerFast = field(repr=False)
    spec: ModelSpec
    name: str
    device: torch.device
    dtype: torch.dtype
    geometry: KvGeometry
    attention: tuple[LayerAttention, ...] = field(repr=False)
    eos_token_ids: frozenset[int]
    context_length: int

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What choosing tokens needs to know of the model's tokens."""
        return Vocabulary(self.tokenizer, self.eos_token_ids, self.spec.vocab_size)

    def __post_init__(self) -> None:
        if len(self.attention) != self.geometry.layers:
            raise InvalidArgumentError(
                f"`attention` has {len(self.attention)} descriptions for {self.geometry.layers} layers"
            )
        if outside := sorted(one for one in self.eos_token_ids if not 0 <= one < self.spec.vocab_size):
            raise InvalidArgumentError(
                f"`eos_token_ids` holds {outside}, outside the vocabulary of {self.spec.vocab_size} tokens"
            )


def load_model(
    name: str | None = None, device: str = "auto", dtype: str = "auto", *, packed: bool = True
) -> LoadedModel:
    """Load a model for serving.

    Args:
        name: a local directory or a hub name; None is the embedded SmolLM2-135M-Instruct.
        device: "cpu", "cuda", or "auto": a GPU where there is one.
        dtype: "float32", "float16", "bfloat16", or "auto": float32 on a CPU (where bfloat16 is many times
            slower) and the model's own on a GPU.
        packed: where that is faster, keep the weights of linear layers as the processor's kernels read them. False
            leaves the model as transformers has it, state_dict included.

    Returns:
        The model on its device, with its tokenizer and description.

    Raises:
        InvalidArgumentError: `device` or `dtype` is another word.
        FailedPreconditionError: the model is not found, is damaged, cannot be served or is larger than the memory, or
            there is no such device.
    """
    place = choose_device(device)
    public_name, directory = find_model(name)
    config = read_config(directory)
    tokenizer = read_tokenizer(directory, config)
    eos = eos_token_ids(directory, config, tokenizer.eos_token_id)
    if place.type == "cpu":
        check_weights_fit(directory, choose_dtype(dtype, place) or own_dtype(config))
    with weights_unchanged(directory):
        model = _read_weights(directory, config, choose_dtype(dtype, place)).to(place)
        digest = weights_digest(directory, names_in_files(model))
    if packed and can_pack(model):
        pack_linear_layers(model)
    geometry = cache_geometry(config, model.dtype)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        spec=describe(config, geometry, digest, tokenizer, eos),
        name=public_name,
        device=place,
        dtype=model.dtype,
        geometry=geometry,
        attention=layer_attention(config),
        eos_token_ids=eos,
        context_length=config.max_position_embeddings,
    )


def named_dtype(name: str) -> torch.dtype:
    """Return the dtype of a name, as model specs have it.

    Args:
        name: "float32", "float16" or "bfloat16".

    Raises:
        InvalidArgumentError: it is another word.
    """
    if name not in _DTYPES:
        raise InvalidArgumentError(f"dtype is {name!r}; allowed: {', '.join(_DTYPES)}")
    return _DTYPES[name]


def choose_device(device: str) -> torch.device:
    """Turn "auto", "cpu" or "cuda" into a device.

    Args:
        device: the word; "auto" is a GPU where there is one.

    Returns:
        The device.

    Raises:
        InvalidArgumentError: `device` is another word.
        FailedPreconditionError: "cuda" is asked for and this process sees no GPU.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise InvalidArgumentError(f"device is {device!r}; allowed: auto, cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise FailedPreconditionError("device is 'cuda', but torch finds no GPU here; use --device cpu or auto")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype | None:
    """Choose the dtype to compute in.

    Args:
        dtype: "auto", "float32", "float16" or "bfloat16".
        device: "auto" is float32 on a CPU, and the model's own dtype elsewhere.

    Returns:
        The dtype; None for the model's own.

    Raises:
        InvalidArgumentError: `dtype` is not "auto", "float32", "float16" or "bfloat16".
    """
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else None
    if dtype not in _DTYPES:
        raise InvalidArgumentError(f"dtype is {dtype!r}; allowed: auto, {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def own_dtype(config: PretrainedConfig) -> torch.dtype:
    """Return the dtype that a model was published in; float32 where its configuration does not say.

    Args:
        config: of the model.
    """
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def _read_weights(directory: Path, config: PretrainedConfig, dtype: torch.dtype | None) -> PreTrainedModel:
    # The fused kernels of "sdpa" do not support soft-capping.
    attention = "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"
    what = f"the weights of the model in {directory} as its config.json describes them"
    with refuse_damage(what), _progress_only_on_terminals():
        model, outcome = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=dtype or "auto",
            attn_implementation=attention,
            use_safetensors=True,
            # Refused below, by name: transformers would blame an option that nobody set.
            ignore_mismatched_sizes=True,
            local_files_only=True,
            output_loading_info=True,
        )
    _check_all_read(directory, config, outcome)
    model.requires_grad_(False)
    ready: PreTrainedModel = model.eval()
    return ready


def _check_all_read(directory: Path, config: PretrainedConfig, outcome: dict[str, Any]) -> None:
    # transformers only warns of tensors that the files lack, and fills them with random numbers.
    for problem in ("missing_keys", "mismatched_keys"):
        if keys := sorted(_name_and_shapes(key) for key in outcome[problem]):
            shown = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise FailedPreconditionError(
                f"the weights in {directory} do not fit config.json of a {config.model_type}: "
                f"{problem.replace('_', ' ')} {shown}; correct model_type and sizes, or fetch the model again"
            )


def _name_and_shapes(key: str | tuple[str, torch.Size, torch.Size]) -> str:
    """Return a tensor's name; where its shape is another than the model's, both shapes too."""
    if isinstance(key, str):
        return key
    name, in_file, of_model = key
    return f"{name} (the file has {list(in_file)}, config.json makes it {list(of_model)})"


@contextmanager
def _progress_only_on_terminals() -> Iterator[None]:
    silence = transformers_logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    if silence:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if silence:
            transformers_logging.enable_progress_bar()
