from typing import Any

import pytest
from transformers import AutoConfig, PretrainedConfig, Qwen2Config

from spectrumkv.common.errors import FailedPreconditionError
from spectrumkv.common.model.load import LoadedModel
from spectrumkv.common.model.support import SUPPORTED_MODEL_TYPES, check_supported, head_dim, layer_attention
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
    with pytest.raises(FailedPreconditionError, match=r"head dimension is 63.*'dynamic'"):
        check_supported(config_of("llama", head_dim=63, rope_parameters={"rope_type": "dynamic", "rope_theta": 1.0}))


def test_mistral_with_layer_types_is_refused() -> None:
    with pytest.raises(FailedPreconditionError, match="layer_types, which transformers ignores"):
        check_supported(config_of("mistral", layer_types=["full_attention", "sliding_attention"]))


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


def test_a_window_that_llama_ignores_is_no_window() -> None:
    assert {layer.sliding_window for layer in layer_attention(config_of("llama", sliding_window=64))} == {None}
