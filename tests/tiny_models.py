"""Small models with random weights, one for each supported architecture.

They have the traits that trip up a KV cache: grouped-query attention, head dimensions from 64 to 256, biases
on keys, normalized queries and keys, sliding windows shorter than the prompts, rotary embeddings that differ between
layers, a single KV head, tied embeddings, soft-capping. Their weights are
drawn so that attention is peaked and logits are spread: greedy output neither collapses into one token nor
hangs on the last bit.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from spectrumkv.bench.models.shaped_model import copy_tokenizer
from spectrumkv.common.model.cache import build_once, cache_directory
from spectrumkv.common.model.embedded import check_model_files

VOCABULARY = 49152
SLIDING_WINDOW = 32
CONTEXT_LENGTH = 2048

# Standard deviation of the elements of queries and keys: logits of attention then spread by its square.
_QUERY_KEY_SCALE = 1.6

_COMMON = {
    "vocab_size": VOCABULARY,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT_LENGTH,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "dtype": torch.float32,
}


def _llama() -> PretrainedConfig:
    return LlamaConfig(
        **_COMMON,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        head_dim=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )


def _qwen2() -> PretrainedConfig:
    # Qwen2 states no head_dim: it is hidden_size / num_attention_heads = 32.
    return Qwen2Config(
        **_COMMON,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    )


def _qwen3() -> PretrainedConfig:
    return Qwen3Config(
        **_COMMON,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=128,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    )


def _mistral() -> PretrainedConfig:
    return MistralConfig(
        **_COMMON,
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=6,
        head_dim=80,
        sliding_window=SLIDING_WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )


def _gemma2() -> PretrainedConfig:
    return Gemma2Config(
        **_COMMON,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        head_dim=256,
        # Unlike head_dim, so that a wrong scaling shows, and soft-capping low enough to bend the logits.
        query_pre_attn_scalar=144,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=20.0,
        sliding_window=SLIDING_WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )


def _gemma3() -> PretrainedConfig:
    options = _COMMON | {"num_key_value_heads": 1, "tie_word_embeddings": True}
    return Gemma3TextConfig(
        **options,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        head_dim=256,
        query_pre_attn_scalar=144,
        sliding_window=SLIDING_WINDOW,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
        },
    )


_CONFIGURATIONS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "mistral": _mistral,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
}

ARCHITECTURES: tuple[str, ...] = tuple(_CONFIGURATIONS)


def build_tiny_model(architecture: str, directory: Path) -> Path:
    """Write the tiny model of `architecture` with the default model's tokenizer into `directory`."""
    config = _CONFIGURATIONS[architecture]()
    model = AutoModelForCausalLM.from_config(config)
    _draw_weights(model, torch.Generator().manual_seed(ARCHITECTURES.index(architecture)))
    model.generation_config.update(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(directory)
    copy_tokenizer(directory)
    return directory


@functools.cache
def tiny_model(architecture: str) -> Path:
    """The tiny model of `architecture` in the cache directory, built where it is missing."""
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    directory = cache_directory() / "tests" / f"tiny-{architecture}-{version}"
    return build_once(directory, "a tiny model", lambda partial: _build(architecture, partial), check_model_files)


def _build(architecture: str, directory: Path) -> None:
    build_tiny_model(architecture, directory)


@torch.no_grad()
def _draw_weights(model: PreTrainedModel, generator: torch.Generator) -> None:
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            parameter.copy_(_QUERY_KEY_SCALE + 0.1 * noise)
        elif name.endswith("norm.weight"):
            # Gemma's norms multiply by 1 + weight and the others' by weight; both start out neutral.
            parameter.add_(0.1 * noise)
        elif name.endswith("bias"):
            parameter.copy_(0.5 * noise)
        else:
            parameter.copy_(_gain(name) * noise / _inputs(name, parameter) ** 0.5)
    if model.config.model_type == "qwen2":
        _add_key_outlier(model)
    elif model.config.model_type == "gemma3_text":
        _balance_tied_embeddings(model)


def _gain(name: str) -> float:
    gains = {"q_proj": _QUERY_KEY_SCALE, "k_proj": _QUERY_KEY_SCALE, "o_proj": 4.0, "lm_head": 3.0}
    return next((gain for part, gain in gains.items() if part in name), 1.0)


def _inputs(name: str, parameter: torch.Tensor) -> int:
    return 1 if "embed_tokens" in name else parameter.shape[1]


def _balance_tied_embeddings(model: PreTrainedModel) -> None:
    # Gemma multiplies embeddings by the root of the hidden size. Left so large, a token's own embedding would
    # outweigh what the layers add to it, and the tied head would predict that token again and again. The last norm
    # gives the logits their spread back.
    model.model.embed_tokens.weight.div_(4 * model.config.hidden_size**0.5)
    model.model.norm.weight.add_(11.0)
    for layer in model.model.layers:
        # These norms multiply by 1 + weight.
        layer.self_attn.q_norm.weight.sub_(1.0)
        layer.self_attn.k_norm.weight.sub_(1.0)


def _add_key_outlier(model: PreTrainedModel) -> None:
    # What breaks INT4 in Qwen2.5 (its first layer's key bias has a norm near 600). The slowest rotary pair
    # hardly turns, so the outlier adds nearly the same to every logit and softmax takes it away again.
    bias = model.model.layers[0].self_attn.k_proj.bias.view(model.config.num_key_value_heads, -1)
    bias[:, bias.shape[1] // 2 - 1] = 60.0


def write_weights_that_no_memory_holds(path: Path) -> None:
    """Write a file of half-precision weights as large as this machine's memory; it has holes and takes no room."""
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    header = json.dumps({"weight": {"dtype": "F16", "shape": [size // 2], "data_offsets": [0, size]}}).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(file.tell() + size)
