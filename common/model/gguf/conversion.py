"""Turns a GGUF file of the llama architecture into a model directory as transformers reads it.

transformers' own conversion rebuilds the tokenizer without the digit splitting that the file names, so that "a  12"
is tokenized as in no training text; `file` says what else is wrong with it.
"""

from pathlib import Path
from typing import Any

import torch
from gguf import MODEL_ARCH, TokenType
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from spectrumkv.common.model.gguf.file import GgufFile, Weights


def convert(gguf_file: Path, directory: Path, published_dtype: torch.dtype) -> None:
    """Write weights, configuration, tokenizer and chat template of a GGUF file into a model directory.

    Args:
        gguf_file: a file of architecture "llama", with a byte-level BPE tokenizer of kind "smollm".
        directory: an existing directory.
        published_dtype: the dtype that the model was published in, which a GPU is to compute in.

    Raises:
        FailedPreconditionError: the file holds another architecture or tokenizer, or its tensors are not
            those of the architecture.
    """
    file = GgufFile(gguf_file, MODEL_ARCH.LLAMA)
    config = _config(file.fields, published_dtype)

    def adjusted(name: str, weights: Weights) -> Weights:
        for projection, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if projection in name:
                return _halves_from_pairs(weights, heads)
        return weights

    save_file(file.weights(config, adjusted), directory / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(directory)
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    ).save_pretrained(directory)
    _tokenizer(file).save_pretrained(directory)


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


def _halves_from_pairs(weights: Weights, heads: int) -> Weights:
    # llama.cpp rotates elements 2i and 2i + 1 of a head together, transformers i and i + head_dim / 2; the
    # rows were reordered to suit the former.
    rows, columns = weights.shape
    pairs = weights.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _tokenizer(file: GgufFile) -> PreTrainedTokenizerFast:
    file.require("tokenizer.ggml.model", "gpt2")
    file.require("tokenizer.ggml.pre", "smollm")
    fields = file.fields
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
