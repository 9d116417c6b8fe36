"""Turn a GGUF file of the gemma3 architecture into a model's directory as transformers reads it.

The file leaves out what llama.cpp takes as given for the architecture: one layer of six sees the whole context, the
others turn keys by base 10,000 (llama.cpp, src/llama-model.cpp, LLM_ARCH_GEMMA3), and queries are divided by the root
of the head dimension, as in all models of the family but the one of 27 billion parameters.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from gguf import MODEL_ARCH
from safetensors.torch import save_file
from transformers import Gemma3TextConfig, GenerationConfig

from spectrumkv.bench.models.gemma.tokenizer import build_tokenizer
from spectrumkv.common.model.gguf.file import GgufFile, Weights

# The last layer of each period sees the whole context.
LAYERS_OF_A_PERIOD = 6
SLIDING_ROPE_THETA = 10000.0


def convert(gguf_file: Path, directory: Path) -> None:
    """Write weights, configuration and tokenizer of a GGUF file into a model's directory.

    Args:
        gguf_file: a file of architecture "gemma3" without scaled rotary embeddings, with a SentencePiece tokenizer.
        directory: an existing directory.

    Raises:
        FailedPreconditionError: the file holds another architecture or tokenizer, or its tensors are not those of
            the architecture.
    """
    file = GgufFile(gguf_file, MODEL_ARCH.GEMMA3)
    for name, expected in (
        ("tokenizer.ggml.model", "llama"),
        ("tokenizer.ggml.pre", "default"),
        ("tokenizer.ggml.add_bos_token", True),
        ("tokenizer.ggml.add_space_prefix", False),
        # The global layers of larger models stretch their angles.
        ("gemma3.rope.scaling.type", None),
    ):
        file.require(name, expected)
    config = _config(file.fields)
    save_file(file.weights(config, _adjusted), directory / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(directory)
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    ).save_pretrained(directory)
    build_tokenizer(file.fields).save_pretrained(directory)


def _config(fields: Mapping[str, Any]) -> Gemma3TextConfig:
    layers = fields["gemma3.block_count"]
    head_dim = fields["gemma3.attention.key_length"]
    # Instruction-tuned files name the end of a turn besides the end of the text.
    ends = {fields[name] for name in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id") if name in fields}
    return Gemma3TextConfig(
        architectures=["Gemma3ForCausalLM"],
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=fields["gemma3.embedding_length"],
        intermediate_size=fields["gemma3.feed_forward_length"],
        num_hidden_layers=layers,
        num_attention_heads=fields["gemma3.attention.head_count"],
        num_key_value_heads=fields["gemma3.attention.head_count_kv"],
        head_dim=head_dim,
        query_pre_attn_scalar=head_dim,
        max_position_embeddings=fields["gemma3.context_length"],
        rms_norm_eps=fields["gemma3.attention.layer_norm_rms_epsilon"],
        sliding_window=fields["gemma3.attention.sliding_window"],
        layer_types=[
            "full_attention" if layer % LAYERS_OF_A_PERIOD == LAYERS_OF_A_PERIOD - 1 else "sliding_attention"
            for layer in range(layers)
        ],
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": fields["gemma3.rope.freq_base"]},
            "sliding_attention": {"rope_type": "default", "rope_theta": SLIDING_ROPE_THETA},
        },
        # llama.cpp leaves the output matrix out where it is the embedding.
        tie_word_embeddings=True,
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=sorted(ends),
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
        # Gemma 3 was published in it, and a GPU is to compute in it.
        dtype=torch.bfloat16,
    )


def _adjusted(name: str, weights: Weights) -> Weights:
    # Gemma's norms multiply by 1 + weight; llama.cpp's file holds the sum.
    return weights - 1 if name.endswith("norm.weight") else weights
