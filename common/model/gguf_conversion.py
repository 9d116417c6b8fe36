"""Turns a GGUF file of the llama architecture into a model directory as transformers reads it.

transformers itself can read GGUF, but then it needs `accelerate`, its dequantization differs between releases (and
hosts whose weights differ in one bit refuse each other), and it rebuilds the tokenizer without the digit splitting
that the file names, so that "a  12" is tokenized as in no training text.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH, GGUFReader, ReaderTensor, TokenType, get_tensor_name_map
from gguf.quants import dequantize
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from spectrumkv.common.errors import FailedPreconditionError


def convert(gguf_file: Path, directory: Path, published_dtype: torch.dtype) -> None:
    """Write weights, configuration, tokenizer and chat template of a GGUF file into a model directory.

    Weights are written as float32: a block-quantized weight is scale × code + offset with float16 scale and offset,
    which no 16-bit dtype holds exactly.

    Args:
        gguf_file: a file of architecture "llama", with a byte-level BPE tokenizer of kind "smollm".
        directory: an existing directory.
        published_dtype: the dtype that the model was published in, which a GPU is to compute in.

    Raises:
        FailedPreconditionError: the file holds another architecture or tokenizer, or its tensors are not
            those of the architecture.
    """
    reader = GGUFReader(gguf_file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    _require(fields, "general.architecture", "llama")
    config = _config(fields, published_dtype)
    save_file(_weights(reader, config), directory / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(directory)
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    ).save_pretrained(directory)
    _tokenizer(fields).save_pretrained(directory)


def _require(fields: dict[str, Any], name: str, expected: str) -> None:
    if fields.get(name) != expected:
        raise FailedPreconditionError(
            f"the GGUF file's {name} is {fields.get(name)!r}; only {expected!r} can be converted"
        )


def _config(fields: dict[str, Any], published_dtype: torch.dtype) -> LlamaConfig:
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        head_dim=fields["llama.rope.dimension_count"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        # llama.cpp leaves the output matrix out where it is the embedding.
        tie_word_embeddings=True,
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
        dtype=published_dtype,
    )


def _weights(reader: GGUFReader, config: LlamaConfig) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        parameters = dict(LlamaForCausalLM(config).named_parameters())
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    stored = {names.get_name(name, (".weight",)): name for name in parameters}
    weights = {stored.get(tensor.name, tensor.name): tensor for tensor in reader.tensors}
    if weights.keys() != parameters.keys():
        odd = sorted(weights.keys() ^ parameters.keys())
        raise FailedPreconditionError(
            f"{len(odd)} of the GGUF file's tensors are missing or unknown: {', '.join(odd[:3])}"
            f"{', …' if len(odd) > 3 else ''}"
        )
    return {name: torch.from_numpy(_dequantize(name, tensor, config)) for name, tensor in _progress(weights)}


def _progress(weights: dict[str, ReaderTensor]) -> Iterator[tuple[str, ReaderTensor]]:
    yield from track(
        weights.items(),
        "Dequantizing weights",
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )


def _dequantize(name: str, tensor: ReaderTensor, config: LlamaConfig) -> np.ndarray[Any, np.dtype[np.float32]]:
    weights = dequantize(tensor.data, tensor.tensor_type)
    for projection, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
        if projection in name:
            weights = _halves_from_pairs(weights, heads)
    # Weights stored as float32 are still read-only views of the file.
    return np.array(weights, dtype=np.float32, order="C")


def _halves_from_pairs(
    weights: np.ndarray[Any, np.dtype[np.float32]], heads: int
) -> np.ndarray[Any, np.dtype[np.float32]]:
    # llama.cpp rotates elements 2i and 2i + 1 of a head together, transformers i and i + head_dim / 2; the
    # rows were reordered to suit the former.
    rows, columns = weights.shape
    pairs = weights.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    _require(fields, "tokenizer.ggml.model", "gpt2")
    _require(fields, "tokenizer.ggml.pre", "smollm")
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # What "smollm" stands for in llama.cpp (`LLAMA_VOCAB_PRE_TYPE_SMOLLM`): every digit by itself, then
    # GPT-2's pattern.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    backend.add_special_tokens([tokens[i] for i, kind in enumerate(kinds) if kind == TokenType.CONTROL])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        model_max_length=fields["llama.context_length"],
        chat_template=fields["tokenizer.chat_template"],
        clean_up_tokenization_spaces=False,
    )
