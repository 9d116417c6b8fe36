"""Says which models can be served, and how their layers attend."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from spectrumkv.common.errors import FailedPreconditionError

SUPPORTED_MODEL_TYPES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text")
# Layers with a sliding window have a rotary embedding of their own.
_ROPE_BY_LAYER_TYPE = ("gemma3_text",)
# Other types may have a bound of attention logits in their configuration, and transformers computes without it.
_SOFTCAPPED = ("gemma2",)

# Under "dynamic" and "longrope" the angles depend on the longest sequence that the process has seen, so a
# key would not mean the same in two processes.
SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")

LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class LayerAttention:
    """The way in which one layer attends.

    Attributes:
        sliding_window: a query at position i sees keys at i - sliding_window + 1 … i; with None all keys up to i.
        scaling: the factor of q · k.
        softcap: logits become softcap · tanh(logits / softcap) before the mask; with None they stay as they are.
    """

    sliding_window: int | None
    scaling: float
    softcap: float | None


def check_supported(config: PretrainedConfig) -> None:
    """Refuse a model that cannot be served.

    Args:
        config: the model's configuration.

    Raises:
        FailedPreconditionError: the model cannot be served; the message has every reason, and what is supported.
    """
    if reasons := list(_obstacles(config)):
        raise FailedPreconditionError(f"this model cannot be served: {'; '.join(reasons)}")


def _obstacles(config: PretrainedConfig) -> Iterator[str]:
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        yield f"its type (model_type) is {config.model_type!r}, supported are {', '.join(SUPPORTED_MODEL_TYPES)}"
        return
    for architecture in config.architectures or ():
        if not architecture.endswith("ForCausalLM"):
            yield (
                f"one of its architectures is {architecture}, and only decoder-only language models (…ForCausalLM) "
                "generate"
            )
    for name in ("is_encoder_decoder", "add_cross_attention"):
        if getattr(config, name, False):
            yield f"it has an encoder or cross-attention ({name} is true), and only decoder-only models are supported"
    quantization: dict[str, Any] | None = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") or quantization or "{}"
        yield (
            f"its weights are quantized ({method}), as quantization_config says; "
            "use the float32, float16 or bfloat16 original"
        )
    if head_dim(config) % 2:
        yield f"its head dimension (head_dim) is {head_dim(config)}, and it must be even"
    yield from _attention_obstacles(config)


def _attention_obstacles(config: PretrainedConfig) -> Iterator[str]:
    layer_types = getattr(config, "layer_types", None) or ()
    if unknown := sorted(set(layer_types) - set(LAYER_TYPES)):
        yield f"it has layers of type {', '.join(unknown)} (layer_types), supported are {', '.join(LAYER_TYPES)}"
    if layer_types and len(layer_types) != config.num_hidden_layers:
        yield f"its configuration gives {len(layer_types)} layer types for {config.num_hidden_layers} layers"
    if "sliding_attention" in layer_types and not config.sliding_window:
        yield "it has layers of sliding attention without a window; give sliding_window in config.json a whole number"
    if config.model_type == "mistral" and layer_types:
        yield "it is a Mistral model with layer_types, which transformers ignores"
    if config.model_type == "gemma3_text" and config.attn_logit_softcapping is not None:
        yield (
            f"its attn_logit_softcapping is {config.attn_logit_softcapping:g}, which bounds attention logits, and "
            "transformers does so only for gemma2"
        )
    if getattr(config, "use_bidirectional_attention", None):
        yield (
            "its attention is bidirectional (use_bidirectional_attention is true), and only causal attention lets a "
            "cache be reused"
        )
    for rope in rotary_embeddings(config).values():
        if (rope_type := rope.get("rope_type")) not in SUPPORTED_ROPE_TYPES:
            supported = ", ".join(SUPPORTED_ROPE_TYPES)
            yield f"its rotary embedding is of type {rope_type!r} (rope_type), supported are {supported}"


def head_dim(config: PretrainedConfig) -> int:
    """Return the elements of one key or value: `head_dim` if the configuration has it, else hidden size ÷ heads."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def layer_attention(config: PretrainedConfig) -> tuple[LayerAttention, ...]:
    """Return how each layer attends, from the first to the last.

    Args:
        config: the configuration of a supported model.
    """
    query_scalar = getattr(config, "query_pre_attn_scalar", None) or head_dim(config)
    softcap = config.attn_logit_softcapping if config.model_type in _SOFTCAPPED else None
    return tuple(LayerAttention(window, query_scalar**-0.5, softcap) for window in _windows(config))


def rope_prefixes(config: PretrainedConfig) -> tuple[str, ...]:
    """Return which rotary embedding each layer has, from the first to the last.

    Args:
        config: the configuration of a model of a supported type.

    Returns:
        Keys of `rotary_embeddings`: prefixes of the names that transformers gives to an embedding's frequencies. All
        are empty where layers share one embedding.
    """
    if config.model_type not in _ROPE_BY_LAYER_TYPE:
        return ("",) * int(config.num_hidden_layers)
    return tuple(f"{kind}_" for kind in _layer_types(config))


def rotary_embeddings(config: PretrainedConfig) -> dict[str, Mapping[str, Any]]:
    """Return the parameters of each rotary embedding that a layer has.

    Args:
        config: the configuration of a model of a supported type.

    Returns:
        Parameters as transformers has them, by prefix; see `rope_prefixes`. An embedding without parameters has none.
    """
    given = config.rope_parameters or {}
    prefixes = sorted(set(rope_prefixes(config)))
    return {prefix: (given.get(prefix.removesuffix("_")) if prefix else given) or {} for prefix in prefixes}


def _windows(config: PretrainedConfig) -> list[int | None]:
    if config.model_type == "mistral":
        return [config.sliding_window] * config.num_hidden_layers
    return [config.sliding_window if kind == "sliding_attention" else None for kind in _layer_types(config)]


def _layer_types(config: PretrainedConfig) -> list[str]:
    layer_types: list[str] | None = getattr(config, "layer_types", None)
    return layer_types or ["full_attention"] * int(config.num_hidden_layers)
