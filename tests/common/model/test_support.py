from typing import Any

import pytest
from transformers import AutoConfig, Gemma3TextConfig, PretrainedConfig, Qwen2Config

from spectrumkv.common.errors import FailedPreconditionError
from spectrumkv.common.model.load import LoadedModel
from spectrumkv.common.model.parameters import model_parameters
from spectrumkv.common.model.support import (
    SUPPORTED_MODEL_TYPES,
    check_supported,
    head_dim,
    layer_attention,
    rope_prefixes,
    rotary_embeddings,
)
from tests.tiny_models import ARCHITECTURES, tiny_model


def config_of(architecture: str, **changes: Any) -> PretrainedConfig:
    config = AutoConfig.from_pretrained(tiny_model(architecture))
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def test_every_supported_type_has_a_tiny_model() -> None:
    assert set(SUPPORTED_MODEL_TYPES) == set(ARCHITECTURES)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_supported_architectures_pass(architecture: str) -> None:
    check_supported(config_of(architecture))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"is_encoder_decoder": True}, "encoder"),
        ({"add_cross_attention": True}, "cross-attention"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantized \(gptq\)"),
        ({"head_dim": 63}, "63, and it must be even"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
        ({"rope_parameters": None}, "rotary embedding is of type None"),
        ({"layer_types": ["full_attention", "linear_attention", "full_attention"]}, "linear_attention"),
        ({"layer_types": ["full_attention"]}, "1 layer types for 3 layers"),
        ({"layer_types": ["sliding_attention"] * 3, "sliding_window": None}, "without a window"),
        ({"use_bidirectional_attention": True}, "bidirectional"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(FailedPreconditionError, match=f"cannot be served: .*{reason}"):
        check_supported(config_of("llama", **changes))


@pytest.mark.parametrize("model_type", ["gpt2", "t5", "mamba", "bert"])
def test_other_types_are_refused_with_what_is_supported(model_type: str) -> None:
    config = AutoConfig.for_model(model_type)
    with pytest.raises(FailedPreconditionError, match=f"'{model_type}', supported are llama, qwen2, .*gemma2"):
        check_supported(config)


def test_all_reasons_are_given_at_once() -> None:
    with pytest.raises(FailedPreconditionError, match=r"head_dim\) is 63.*'dynamic'"):
        check_supported(config_of("llama", head_dim=63, rope_parameters={"rope_type": "dynamic", "rope_theta": 1.0}))


def test_mistral_with_layer_types_is_refused() -> None:
    with pytest.raises(FailedPreconditionError, match="layer_types, which transformers ignores"):
        check_supported(config_of("mistral", layer_types=["full_attention", "sliding_attention"]))


def test_what_transformers_ignores_of_a_gemma3_is_refused() -> None:
    with pytest.raises(FailedPreconditionError, match=r"attn_logit_softcapping is 50, .* only for gemma2"):
        check_supported(config_of("gemma3_text", attn_logit_softcapping=50.0))


def test_every_rotary_embedding_of_a_model_is_checked() -> None:
    one, other = {"rope_type": "default", "rope_theta": 1e4}, {"rope_type": "dynamic", "rope_theta": 1e6}
    for ropes in ((one, other), (other, one)):
        rope_parameters = dict(zip(("full_attention", "sliding_attention"), ropes, strict=True))
        with pytest.raises(FailedPreconditionError, match="rotary embedding is of type 'dynamic'"):
            check_supported(config_of("gemma3_text", rope_parameters=rope_parameters))
    with pytest.raises(FailedPreconditionError, match="rotary embedding is of type None"):
        check_supported(config_of("gemma3_text", rope_parameters={"full_attention": one}))
    # What belongs to no layer does not matter.
    check_supported(
        config_of("gemma3_text", layer_types=["full_attention"] * 4, rope_parameters={"full_attention": one})
    )


def test_layers_have_the_rotary_embedding_of_their_type() -> None:
    sliding, full = "sliding_attention_", "full_attention_"
    assert rope_prefixes(config_of("gemma3_text")) == (sliding, sliding, full, sliding)
    assert rope_prefixes(config_of("gemma2")) == ("", "", "")
    ropes = rotary_embeddings(config_of("gemma3_text"))
    assert {prefix: rope["rope_theta"] for prefix, rope in ropes.items()} == {full: 1e6, sliding: 1e4}


def test_a_gemma3_of_the_hub_is_read_as_its_makers_mean_it() -> None:
    # As google/gemma-3-4b-pt spells it: a period in place of layer types, two bases, and scaling of the global one.
    config = Gemma3TextConfig(
        num_hidden_layers=12,
        sliding_window=1024,
        sliding_window_pattern=6,
        rope_theta=1000000.0,
        rope_local_base_freq=10000.0,
        rope_scaling={"factor": 8.0, "rope_type": "linear"},
    )
    check_supported(config)
    assert [layer.sliding_window for layer in layer_attention(config)] == ([1024] * 5 + [None]) * 2
    parameters = model_parameters(config, [1, 106])
    assert parameters["sliding_layers"] == "0,1,2,3,4,6,7,8,9,10"
    assert {name: value for name, value in parameters.items() if "rope" in name} == {
        "full_attention_rope_type": "linear",
        "full_attention_rope_theta": "1000000",
        "full_attention_rope_partial_rotary_factor": "1",
        "full_attention_rope_factor": "8",
        "sliding_attention_rope_type": "default",
        "sliding_attention_rope_theta": "10000",
    }


def test_head_dim_is_derived_where_it_is_not_stated() -> None:
    assert getattr(config_of("qwen2"), "head_dim", None) is None
    assert head_dim(config_of("qwen2")) == 32
    assert head_dim(config_of("gemma2")) == 256


def test_layer_attention_is_what_the_modules_do(loaded: LoadedModel) -> None:
    facts = layer_attention(loaded.model.config)
    modules = [layer.self_attn for layer in loaded.model.model.layers]
    assert facts == loaded.attention
    assert len(facts) == len(modules)
    is_mistral = loaded.spec.architecture == "mistral"
    for fact, module in zip(facts, modules, strict=True):
        assert fact.scaling == pytest.approx(module.scaling, rel=1e-12)
        # Gemma 3's modules have the attribute and do not use it.
        assert fact.softcap == getattr(module, "attn_logit_softcapping", None)
        # Mistral's modules take the window from the configuration as they run.
        assert fact.sliding_window == (
            module.config.sliding_window if is_mistral else getattr(module, "sliding_window", None)
        )


def test_sliding_windows_start_where_the_configuration_says() -> None:
    config = Qwen2Config(num_hidden_layers=4, use_sliding_window=True, sliding_window=128, max_window_layers=3)
    assert [layer.sliding_window for layer in layer_attention(config)] == [None, None, None, 128]
    unused = Qwen2Config(num_hidden_layers=2, sliding_window=128)
    assert [layer.sliding_window for layer in layer_attention(unused)] == [None, None]


def test_what_llama_ignores_is_not_there() -> None:
    layers = layer_attention(config_of("llama", sliding_window=64, attn_logit_softcapping=30.0))
    assert {(layer.sliding_window, layer.softcap) for layer in layers} == {(None, None)}
