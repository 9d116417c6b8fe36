"""Make the key-bias model: it computes what the default model does, with key biases so large that INT4 fails.

Qwen2.5's keys have biases of norm 600 in the first layer and 900 in the last. One channel of such a key sets the
scale, at which a quantizer rounds the other channels to zero. No model with such biases is small enough for a test,
so this one is made. A key bias in rotary pairs that hardly turn adds nearly the same number to a query's logits for
all keys, and softmax cancels it, so the model computes the same as before from other keys.

The bias b of a key at position n adds (R(n)ᵀ q) · b to the logit of a query q, where R is the rotary embedding. The b
for which this varies least over the keys that q attends to is the eigenvector with the smallest eigenvalue of the
covariance of R(n)ᵀ q in the slowest pairs, weighted by attention, over the queries of the project's own prose.
"""

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, Qwen2Config

from spectrumkv.common.errors import FailedPreconditionError
from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.model.cache import build_once, cache_directory
from spectrumkv.common.model.embedded import EMBEDDED_MODEL_NAME, check_model_files, embedded_model_directory
from spectrumkv.common.model.files.directory import tokenizer_class, weight_files
from spectrumkv.common.model.support import head_dim
from spectrumkv.kernels.logits import causal_mask
from spectrumkv.prefill_server.engine.attention import ATTENTION_NAME
from spectrumkv.prefill_server.tuning.needle.haystack import haystack
from spectrumkv.prefill_server.tuning.replay import capture_prompt

# Increase this when a change builds another model than before.
BUILD = 1
# Rotary pairs that may carry a bias.
SLOWEST_PAIRS = 8
# The observed queries are the last ones of a prompt.
PROSE_TOKENS = 2048
OBSERVED_QUERIES = 256
QUERIES_AT_ONCE = 128
# Settings that llama's configuration shares with Qwen2's.
SHARED_SETTINGS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings",
    "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BiasNorms:
    """Hold the norms of a layer's key bias over all its KV heads.

    Attributes:
        first: norm in the first layer.
        middle: norm in the layers between.
        last: norm in the last layer.
    """

    first: float = 600.0
    middle: float = 100.0
    last: float = 900.0

    def of_layer(self, layer: int, layers: int) -> float:
        """Return the norm in layer `layer` of `layers`."""
        return self.first if layer == 0 else self.last if layer == layers - 1 else self.middle


def key_bias_model_directory() -> Path:
    """Return the directory of the key-bias model (538 MB); the first call builds it from the default model.

    Raises:
        FailedPreconditionError: the default model cannot be loaded, or the disk is full.
    """
    source = embedded_model_directory()
    name = f"{EMBEDDED_MODEL_NAME.lower()}-key-bias-{BUILD}"
    return build_once(
        cache_directory() / "models" / name,
        "the key-bias model",
        lambda partial: build_key_bias_model(source, partial, BiasNorms()),
        check_model_files,
    )


def build_key_bias_model(source: Path, directory: Path, norms: BiasNorms) -> None:
    """Write a Qwen2 model that computes nearly what a llama model does.

    Args:
        source: directory of the llama model.
        directory: an empty directory.
        norms: norms of the key biases; query and value biases are zero.

    Raises:
        FailedPreconditionError: the model is not a llama, or has biases already.
    """
    logger.info("giving key biases to the model in %s", source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, local_files_only=True).eval()
    config = _qwen2_config(model.config)
    weights = {name: tensor for file in weight_files(source) for name, tensor in load_file(file).items()}
    for layer, bias in enumerate(find_key_biases(model, _prose(source), norms)):
        attention = f"model.layers.{layer}.self_attn"
        weights[f"{attention}.k_proj.bias"] = bias
        weights[f"{attention}.v_proj.bias"] = torch.zeros_like(bias)
        weights[f"{attention}.q_proj.bias"] = torch.zeros(config.num_attention_heads * head_dim(config))
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(directory)
    for file in source.iterdir():
        if file.is_file() and file.name != "config.json" and file.suffix != ".safetensors":
            shutil.copy(file, directory)


def find_key_biases(model: PreTrainedModel, token_ids: Sequence[int], norms: BiasNorms) -> list[torch.Tensor]:
    """Return each layer's key bias.

    Biases are rounded to whole numbers, so that machines whose last bits differ make the same model.

    Args:
        model: a llama model; its attention is switched to the prefill service's.
        token_ids: tokens of a text like those that the model will read.
        norms: norms of the biases before rounding.

    Returns:
        A bias for each layer, float32 `[kv_heads · head_dim]`.
    """
    model.set_attn_implementation(ATTENTION_NAME)
    frequencies = model.model.rotary_emb.inv_freq[-SLOWEST_PAIRS:].double()
    observed = capture_prompt(model, token_ids, OBSERVED_QUERIES).layers
    return [_key_bias(layer, frequencies, norms.of_layer(layer.layer, len(observed))) for layer in observed]


def _key_bias(layer: LayerCapture, frequencies: torch.Tensor, norm: float) -> torch.Tensor:
    """Return one layer's key bias; heads share the norm so that it changes the attention of each equally."""
    kv_heads, _, head_dim = layer.keys.shape
    slowest = [torch.arange(half - SLOWEST_PAIRS, half) for half in (head_dim // 2, head_dim)]
    steadiest = [
        _steadiest_direction(one[:, torch.cat(slowest)], attended, frequencies)
        for one, attended in zip(layer.queries.reshape(kv_heads, -1, head_dim), attention_weights(layer), strict=True)
    ]
    bias = torch.zeros(kv_heads, head_dim)
    bias[:, torch.cat(slowest)] = torch.stack([direction / change for direction, change in steadiest]).float()
    sized: torch.Tensor = (bias * (norm / bias.norm())).round().flatten()
    return sized


def _steadiest_direction(
    queries: torch.Tensor, attended: torch.Tensor, frequencies: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """Return the unit vector whose product with queries, turned back by a key's position, varies least over the keys.

    Args:
        queries: `[m, 2 · pairs]`, after their rotary embedding.
        attended: `[m, n]`, the attention by which each query weights the keys.
        frequencies: radians per token, `[pairs]`.

    Returns:
        The vector, float64 `[2 · pairs]`, and the standard deviation of that product.
    """
    angles = torch.arange(attended.shape[1], dtype=torch.float64)[:, None] * frequencies
    covariance = torch.zeros(queries.shape[1], queries.shape[1], dtype=torch.float64)
    for some, weights in zip(*(torch.split(one, QUERIES_AT_ONCE) for one in (queries, attended)), strict=True):
        low, high = some[:, None].double().chunk(2, dim=-1)
        turned = torch.cat(
            [low * angles.cos() + high * angles.sin(), high * angles.cos() - low * angles.sin()], dim=-1
        )
        mean = weights.double()[:, None] @ turned
        deviations = ((turned - mean) * weights.double().sqrt()[..., None]).flatten(0, 1)
        covariance += deviations.T @ deviations
    variances, directions = torch.linalg.eigh(covariance / len(queries))
    steadiest = directions[:, 0]
    # Both signs are right; fix one, because libraries differ.
    steadiest = steadiest * steadiest[steadiest.abs().argmax()].sign()
    return steadiest, float(variances[0].clamp_min(torch.finfo(torch.float64).tiny).sqrt())


def attention_weights(layer: LayerCapture) -> torch.Tensor:
    """Return how the observed queries of a layer weight its tokens.

    Args:
        layer: the layer, with w observed queries and n tokens.

    Returns:
        Attention weights, `[kv_heads, query_heads per KV head · w, n]`.
    """
    kv_heads, tokens, head_dim = layer.keys.shape
    logits = layer.queries.reshape(kv_heads, -1, head_dim) @ layer.keys.transpose(1, 2) * layer.scaling
    window = layer.queries.shape[1]
    seen = causal_mask(range(tokens - window, tokens), tokens, layer.sliding_window, layer.keys.device)
    logits.view(-1, window, tokens).masked_fill_(~seen, -torch.inf)
    return logits.softmax(dim=-1)


def _prose(source: Path) -> list[int]:
    tokenizer = tokenizer_class(source).from_pretrained(source, local_files_only=True)
    text = "".join(haystack(0).sentences)
    token_ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids[:PROSE_TOKENS]
    return token_ids


def _qwen2_config(config: PretrainedConfig) -> Qwen2Config:
    if config.model_type != "llama" or config.attention_bias or config.mlp_bias:
        raise FailedPreconditionError(f"a model of type {config.model_type!r} cannot be given key biases as a Qwen2")
    # 16 bits are too few for such keys: at 500, bfloat16 has only every second whole number.
    shared = {name: getattr(config, name) for name in SHARED_SETTINGS}
    return Qwen2Config(**shared, head_dim=head_dim(config), architectures=["Qwen2ForCausalLM"], dtype=torch.float32)
