"""What can be wrong in a model's files, and what the refusal of each says; what may be in them besides."""

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

import tokenizers

COUNT = "a whole number from 1 to 2147483647"
POSITIVE, OBJECT, TRUTH = "a number above 0", "an object in braces", "true or false"
TOKEN = "a whole number from 0 to 49151"
ROPE_TYPES = "default, linear, llama3, yarn"
DTYPES = "float32, float16, bfloat16, float64"
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LINEAR, YARN = ({"rope_type": kind, "rope_theta": 1e4} for kind in ("linear", "yarn"))


class Case(NamedTuple):
    """A damaged file, and what its refusal says besides the file's name.

    Attributes:
        content: fields that go over the file's own, or the whole file as text.
        says: parts of the refusal.
    """

    content: Any
    says: tuple[str, ...]


def cases(names: str, values: Iterable[object], allowed: str) -> list[Case]:
    """Each field with each value: the refusal says the name, the value as JSON has it, and what is allowed."""
    return [
        Case({name: value}, (f"{name} is {json.dumps(value)[:60]}", allowed))
        for name in names.split()
        for value in values
    ]


def ropes(values: Iterable[dict[str, Any]], *says: str) -> list[Case]:
    """Each rotary embedding: the refusal says these parts."""
    return [Case({"rope_parameters": value}, says) for value in values]


CONFIG = [
    *cases("num_attention_heads num_hidden_layers hidden_size num_key_value_heads",
           (0, -1, 2.5, "4", [], 10**30), COUNT),
    *cases("vocab_size intermediate_size max_position_embeddings head_dim", (0, -3, "x", {}, True), COUNT),
    *cases("rms_norm_eps", (0, -1e-6, "1e-6", [], None, float("nan"), float("inf"), 10**400), POSITIVE),
    *cases("dtype torch_dtype", ("float99", 16, [], "int8", "layers"), DTYPES),
    *cases("rope_parameters rope_scaling", ([], 3, "default"), OBJECT),
    *ropes([{"rope_type": 7}], "type 7 (rope_type)", ROPE_TYPES),
    *ropes([{"rope_type": []}], "type [] (rope_type)", ROPE_TYPES),
    *ropes([{"rope_type": "dynamic"}], 'rope_type of rope_parameters is "dynamic"', ROPE_TYPES),
    *(Case({"rope_parameters": ROPE | {"rope_theta": value}},
           (f"rope_theta of the rotary embedding is {text}", POSITIVE))
      for value, text in ((0, "0"), ("x", '"x"'), (None, "null"), (float("nan"), "NaN"))),
    *(Case({"rope_parameters": rope | {"factor": value}}, (f"factor of the rotary embedding is {text}", POSITIVE))
      for rope, value, text in ((LINEAR, 0, "0"), (LINEAR, "x", '"x"'), (LINEAR, None, "null"), (YARN, [], "[]"),
                                (YARN, -1.0, "-1.0"))),
    *(Case({"rope_parameters": YARN | {"factor": 2.0, name: value}}, (f"{name} of the rotary embedding is {value}",))
      for name, value in (("beta_fast", 0), ("beta_slow", -1), ("mscale", -2), ("attention_factor", []),
                          ("truncate", 3))),
    *ropes([YARN | {"factor": 2.0, "original_max_position_embeddings": 0}],
           "original_max_position_embeddings of rope_parameters is 0", POSITIVE),
    *ropes([LINEAR], "rope_parameters lacks factor", "with rope_type linear", POSITIVE),
    *ropes([YARN], "rope_parameters lacks factor", "with rope_type yarn", POSITIVE),
    *ropes([{"rope_type": "llama3"}], "rope_parameters lacks factor, low_freq_factor, high_freq_factor", POSITIVE),
    *cases("hidden_act", ("no-such-function", 3, None, []), "gelu_pytorch_tanh"),
    *cases("architectures", (3, [3], "LlamaForCausalLM", {}), "a list (each entry a text)"),
    Case({"architectures": ["NoSuchModel"]}, ("architectures is NoSuchModel", "…ForCausalLM")),
    *cases("eos_token_id", ("2", 2.0, [[2]], {"a": 1}), "a whole number"),
    *cases("eos_token_id", (-1, 10**9, [2, 49152]), TOKEN),
    *cases("model_type", (3, None, [], "no-such-type"), "llama, qwen2, qwen3, mistral, gemma2, gemma3_text"),
    Case({"model_type": "gpt2"}, ("its type (model_type) is 'gpt2'", "llama, qwen2, qwen3, mistral, gemma2")),
    Case({"model_type": "gemma2"},
         ("do not fit config.json of a gemma2", "feedforward_layernorm.weight", "correct model_type")),
    *cases("quantization_config", (3, "gptq"), OBJECT),
    Case({"quantization_config": {}}, ("quantized ({}), as quantization_config says", "bfloat16 original")),
    *cases("attention_bias tie_word_embeddings use_cache mlp_bias", ("yes", 7, None), TRUTH),
    Case({"num_key_value_heads": 3}, ("num_attention_heads is 4", "num_key_value_heads, 3, must divide it")),
    *cases("pad_token_id bos_token_id", ("x", [], 2.5), "a whole number or null"),
    Case({"pad_token_id": 49152}, ("pad_token_id is 49152", "below vocab_size, 49152")),
    *cases("attention_dropout", ("x", []), "a number or null"),
    *cases("pretraining_tp", ("x",), "a whole number or null"),
    Case({"is_encoder_decoder": True}, ("is_encoder_decoder is true", "only decoder-only models")),
]  # fmt: skip
CONFIG_LOADS = [
    {"rms_norm_eps": 1}, {"rope_parameters": {}}, {"rope_parameters": {"full_attention": ROPE}},
    {"auto_map": {"AutoConfig": "code.Config"}}, {"transformers_version": 5}, {"pad_token_id": -1}, {"dtype": None},
    {"architectures": None}, {"rope_parameters": YARN | {"factor": None}}, {"dtype": "float64"},
]  # fmt: skip
# What only models with a rotary embedding for each type of layer have.
BY_LAYER_TYPE = [
    *(Case({"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE} | {name: value}}, says)
      for name in ("full_attention", "sliding_attention")
      for value, says in (
          (3, (f"{name} of rope_parameters is 3", OBJECT)),
          ([], (f"{name} of rope_parameters is []", OBJECT)),
          ("default", (f'{name} of rope_parameters is "default"', OBJECT)),
          ({"rope_type": 7}, ("type 7 (rope_type)", ROPE_TYPES)),
          (ROPE | {"rope_theta": 0}, ("rope_theta of the rotary embedding is 0", POSITIVE)),
          (ROPE | {"rope_type": "dynamic"}, ('rope_type of rope_parameters is "dynamic"', ROPE_TYPES)),
          (LINEAR | {"factor": -1.0}, ("factor of the rotary embedding is -1.0", POSITIVE)),
          (LINEAR, ("rope_parameters lacks factor", "with rope_type linear", POSITIVE)))),
    *cases("layer_types", (3, "sliding_attention", [3] * 4, [[]] * 4), "a list (each entry a text)"),
    Case({"layer_types": ["full_attention"]}, ("`num_hidden_layers` (4) must be equal", "`layer_types` (1)")),
    Case({"layer_types": []}, ("`num_hidden_layers` (4) must be equal", "`layer_types` (0)")),
    *cases("rope_parameters", (3, []), OBJECT),
    *cases("sliding_window", (0, "x"), COUNT),
    Case({"sliding_window": None},
         ("sliding attention without a window", "give sliding_window in config.json a whole")),
    *cases("query_pre_attn_scalar final_logit_softcapping", (0, "x"), POSITIVE),
    Case({"attn_logit_softcapping": 30.0}, ("attn_logit_softcapping is 30", "only for gemma2")),
    Case({"use_bidirectional_attention": True}, ("use_bidirectional_attention is true", "only causal attention")),
    *cases("hidden_activation", ("no-such-function", 3), "gelu_pytorch_tanh"),
]  # fmt: skip
BY_LAYER_TYPE_LOADS = [
    {"rope_parameters": {"full_attention": None, "sliding_attention": ROPE}}, {"rope_parameters": ROPE},
    {"rope_parameters": {"full_attention": ROPE, "sliding_attention": None}}, {"rope_parameters": {}},
    {"rope_local_base_freq": 0}, {"layer_types": None, "sliding_window_pattern": 2},
]  # fmt: skip
NO_JSON = [
    *(Case(text, (f"it holds {text}", OBJECT)) for text in ("[]", "3", "null")),
    Case("", ("Expecting value: line 1 column 1",)),
    Case("{", ("Expecting property name enclosed in double quotes: line 1 column 2",)),
    Case("\0\0\0\0", ("Expecting value: line 1 column 1",)),
    Case("\xff", ("'utf-8' codec can't decode byte 0xff in position 0",)),
]
GENERATION = [
    *NO_JSON,
    *cases("eos_token_id", ("2", [None], {}, True, -1, [49152]), TOKEN),
    Case({"cache_implementation": 7}, ("`cache_implementation` (7)", "'static'")),
    Case({"compile_config": 3}, ("`compile_config`", "'int'", "`CompileConfig`")),
]
GENERATION_LOADS = [{"temperature": "hot"}, {"max_length": []}, {"do_sample": 3, "num_beams": "x"}]
TOKENIZER_CONFIG = [
    *NO_JSON,
    *cases("tokenizer_class", (3, []), "a text or null"),
    *cases("eos_token pad_token", (3, [], {"content": 3}), "a text or an object with a content that is a text"),
    *cases("added_tokens_decoder", ([], {"x": 3}, {"5": {"content": 3}}), "an object whose keys are token ids"),
    *cases("model_max_length", ("x", -1), POSITIVE),
    *cases("chat_template", (3, [3]), "a text or a list"),
    *cases("extra_special_tokens", (3, [3], {"a": 3}), "a list (each entry a text"),
]
TOKENIZER_CONFIG_LOADS = [{"tokenizer_class": "NoSuchTokenizer"}, {"auto_map": 3}]
UNREAD = f"which tokenizers {tokenizers.__version__} does not read"
TOKENIZER = [
    *NO_JSON,
    Case("{}", ("it lacks added_tokens; it lacks model",)),
    *cases("model", (3, {"type": "OfTomorrow"}, {"type": "BPE"}, {"type": "BPE", "vocab": [], "merges": 3}), UNREAD),
    *cases("version", ("9.0",), UNREAD),
    *cases("pre_tokenizer normalizer post_processor decoder", ({"type": "OfTomorrow"}, {"type": 3}, []), UNREAD),
    *cases("added_tokens", ({}, [3]), UNREAD),
]
