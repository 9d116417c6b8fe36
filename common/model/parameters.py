"""Says what a model computes with besides its weights, in one spelling, so that two processes can compare it.

A configuration can say the same in many ways: a number as 10000 or 10000.0, a default written out or left out, an
older name of a parameter. And it says what no computation reads. Here are the values that the model computes with.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PretrainedConfig

from spectrumkv.common.model.support import head_dim, layer_attention, rotary_embeddings

# Fields that stand in the parameters under their own names. Not all of the supported types have all of them.
_PLAIN = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "rms_norm_eps",
    "attention_bias",
    "mlp_bias",
    "tie_word_embeddings",
    "final_logit_softcapping",
)
# What the rotary embedding of type "llama3" reads besides `rope_theta` and `partial_rotary_factor`.
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# Two names of the same function.
_ACTIVATIONS = {"swish": "silu"}
_NONE = "none"


def model_parameters(config: PretrainedConfig, eos_token_ids: Iterable[int]) -> dict[str, str]:
    """Return what the model computes with besides its weights.

    Args:
        config: the configuration of a supported model.
        eos_token_ids: the tokens that end a generation.

    Returns:
        Values by name, both as text. The names are those of config.json where it has one: `sliding_window` is "none"
        or the window, and `sliding_layers` lists the layers that have it.
    """
    activation = str(getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", _NONE))
    plain = {name: _text(getattr(config, name)) for name in _PLAIN if hasattr(config, name)}
    return {
        **plain,
        "hidden_act": _ACTIVATIONS.get(activation, activation),
        "eos_token_id": ",".join(map(str, sorted(eos_token_ids))) or _NONE,
        **_attention(config),
        **rope_parameters(config),
    }


def rope_parameters(config: PretrainedConfig) -> dict[str, str]:
    """Return the parameters of the rotary embeddings that their types read, defaults included.

    Args:
        config: the configuration of a supported model.

    Returns:
        Values by name, both as text; names begin with "rope_", or with the type of the layers that have the
        embedding, as in "sliding_attention_rope_theta".
    """
    return {
        f"{prefix}rope_{name}": _text(value)
        for prefix, given in rotary_embeddings(config).items()
        for name, value in _read_by_type(given, config.max_position_embeddings).items()
    }


def _read_by_type(given: Mapping[str, Any], context_length: int) -> dict[str, Any]:
    """Return what a rotary embedding of the given type reads."""
    kind = given["rope_type"]
    read: dict[str, Any] = {"type": kind, "theta": given["rope_theta"]}
    if kind != "default":
        read["partial_rotary_factor"] = _or(given, "partial_rotary_factor", 1)
    if kind == "linear":
        read["factor"] = given["factor"]
    elif kind == "llama3":
        read |= {name: given[name] for name in _LLAMA3}
    elif kind == "yarn":
        read |= _yarn(given, context_length)
    return read


def _yarn(given: Mapping[str, Any], context_length: int) -> dict[str, Any]:
    """Return what YaRN reads, with its defaults (YaRN, arXiv 2309.00071, section 3)."""
    trained = _or(given, "original_max_position_embeddings", context_length)
    factor = _or(given, "factor", context_length / trained)
    attention_factor = given.get("attention_factor")
    if attention_factor is None:
        mscale, mscale_all_dim = given.get("mscale"), given.get("mscale_all_dim")
        attention_factor = (
            _temperature(factor, mscale) / _temperature(factor, mscale_all_dim)
            if mscale and mscale_all_dim
            else _temperature(factor, 1)
        )
    return {
        "factor": factor,
        "original_max_position_embeddings": trained,
        "attention_factor": attention_factor,
        "beta_fast": given.get("beta_fast") or 32,
        "beta_slow": given.get("beta_slow") or 1,
        "truncate": bool(given.get("truncate", True)),
    }


def _temperature(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _or(given: Mapping[str, Any], name: str, default: float) -> Any:
    value = given.get(name)
    return default if value is None else value


def _attention(config: PretrainedConfig) -> dict[str, str]:
    layers = layer_attention(config)
    windows = {one.sliding_window for one in layers if one.sliding_window is not None}
    sliding = [str(index) for index, one in enumerate(layers) if one.sliding_window is not None]
    return {
        "query_pre_attn_scalar": _text(getattr(config, "query_pre_attn_scalar", None) or head_dim(config)),
        "attn_logit_softcapping": _text(layers[0].softcap),
        "sliding_window": ",".join(map(_text, sorted(windows))) or _NONE,
        "sliding_layers": "all" if len(sliding) == len(layers) else ",".join(sliding) or _NONE,
    }


def _text(value: Any) -> str:
    """Return a value as text: the same for 1 and 1.0, and for 0.00001 and 1e-05."""
    if value is None:
        return _NONE
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)
