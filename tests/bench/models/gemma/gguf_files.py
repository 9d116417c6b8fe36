"""A GGUF file of a tiny model of Gemma 3's architecture, as llama.cpp would write it."""

from pathlib import Path
from typing import Any

import torch
from gguf import MODEL_ARCH, GGUFWriter, TokenType, get_tensor_name_map
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

CONTROL = ("<pad>", "<eos>", "<bos>", "<unk>")
USER_DEFINED = ("\n", "\n\n", "  ", "   ", "<b>")
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
# From the highest score to the lowest; pieces that begin and end alike are left out (see `_merges`).
NORMAL = (
    *("th", "▁th", "the", "▁the", "in", "ing", "▁b", "an", "and", "▁and", "▁ban", "en", "ent", "hen", "then", "▁an"),
    *("aé", "éb", "th▁", "n▁", "gn", "▁", "e", "t", "h", "i", "n", "g", "a", "b", "d", "é", "世"),
)
TOKENS = (*CONTROL, *USER_DEFINED, *BYTES, *NORMAL)
KINDS = (
    *(TokenType.CONTROL,) * len(CONTROL),
    *(TokenType.USER_DEFINED,) * len(USER_DEFINED),
    *(TokenType.BYTE,) * len(BYTES),
    *(TokenType.NORMAL,) * len(NORMAL),
)
SCORES = (*(-1000.0,) * (len(TOKENS) - len(NORMAL)), *(-float(rank) for rank in range(len(NORMAL))))
CONFIG = Gemma3TextConfig(
    vocab_size=len(TOKENS),
    hidden_size=48,
    intermediate_size=40,
    # Two of six periods, and a part of a third.
    num_hidden_layers=13,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=24,
    query_pre_attn_scalar=24,
    sliding_window=5,
    max_position_embeddings=64,
    tie_word_embeddings=True,
    rope_theta=1000000.0,
    rope_local_base_freq=10000.0,
)


def fields(**changes: Any) -> dict[str, Any]:
    """What `GgufFile.fields` has of the tokenizer, with changes."""
    return {
        "general.architecture": "gemma3",
        "gemma3.context_length": 64,
        "tokenizer.ggml.tokens": list(TOKENS),
        "tokenizer.ggml.scores": list(SCORES),
        "tokenizer.ggml.token_type": list(KINDS),
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 3,
        **changes,
    }


def write_gguf(
    file: Path,
    model: Gemma3ForCausalLM,
    architecture: str = "gemma3",
    tokenizer: str = "llama",
    scaled: bool = False,
    leave_out: str = "",
    turn_end: int | None = None,
) -> Path:
    """Write the model; the options damage the file, or give it a token that ends a turn."""
    writer = GGUFWriter(file, architecture)
    writer.add_block_count(CONFIG.num_hidden_layers)
    writer.add_context_length(CONFIG.max_position_embeddings)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_head_count(CONFIG.num_attention_heads)
    writer.add_head_count_kv(CONFIG.num_key_value_heads)
    writer.add_key_length(CONFIG.head_dim)
    writer.add_value_length(CONFIG.head_dim)
    writer.add_rope_freq_base(1000000.0)
    if scaled:
        writer.add_string(f"{architecture}.rope.scaling.type", "linear")
    writer.add_sliding_window(CONFIG.sliding_window)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_tokenizer_model(tokenizer)
    writer.add_tokenizer_pre("default")
    writer.add_token_list(list(TOKENS))
    writer.add_token_scores(list(SCORES))
    writer.add_token_types(list(KINDS))
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)
    if turn_end is not None:
        writer.add_eot_token_id(turn_end)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    names = get_tensor_name_map(MODEL_ARCH.GEMMA3, CONFIG.num_hidden_layers)
    for name, weight in model.named_parameters():
        if name != leave_out:
            stored = weight.detach() + 1 if name.endswith("norm.weight") else weight.detach()
            writer.add_tensor(names.get_name(name, (".weight",)), stored.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def tiny_gemma() -> Gemma3ForCausalLM:
    """The model, whose norms differ from one another."""
    torch.manual_seed(3)
    model = Gemma3ForCausalLM(CONFIG).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.normal_(std=0.2)
    return model
