from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf import MODEL_ARCH, GGUFWriter, TokenType, get_tensor_name_map
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from spectrumkv.common.errors import FailedPreconditionError
from spectrumkv.common.model.gguf.conversion import convert

TOKENS = ["<|unk|>", "<|start|>", "<|end|>", "a", "b", "Ġ", "1", "2", "ab", "ĠĠ"]
MERGES = ["a b", "Ġ Ġ"]
CONFIG = LlamaConfig(
    vocab_size=len(TOKENS),
    hidden_size=48,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    max_position_embeddings=64,
    tie_word_embeddings=True,
    rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
)


@pytest.fixture
def original() -> LlamaForCausalLM:
    torch.manual_seed(3)
    return LlamaForCausalLM(CONFIG).eval()


def reorder_for_llama_cpp(name: str, weight: torch.Tensor) -> torch.Tensor:
    # Row i of a head's first half comes to 2i, row i of its second half to 2i + 1.
    if "q_proj" not in name and "k_proj" not in name:
        return weight
    halves = weight.view(-1, 2, CONFIG.head_dim // 2, weight.shape[1])
    return torch.stack((halves[:, 0], halves[:, 1]), dim=2).reshape(weight.shape)


def write(
    file: Path, model: LlamaForCausalLM, architecture: str = "llama", kind: str = "smollm", leave_out: str = ""
) -> Path:
    writer = GGUFWriter(file, architecture)
    writer.add_block_count(CONFIG.num_hidden_layers)
    writer.add_context_length(CONFIG.max_position_embeddings)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_head_count(CONFIG.num_attention_heads)
    writer.add_head_count_kv(CONFIG.num_key_value_heads)
    writer.add_rope_dimension_count(CONFIG.head_dim)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(kind)
    writer.add_token_list(TOKENS)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, CONFIG.num_hidden_layers)
    for name, weight in model.named_parameters():
        if name != leave_out:
            stored = reorder_for_llama_cpp(name, weight.detach())
            writer.add_tensor(names.get_name(name, (".weight",)), stored.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_converted_weights_compute_the_same(original: LlamaForCausalLM, tmp_path: Path) -> None:
    convert(write(tmp_path / "model.gguf", original), tmp_path, torch.float16)
    converted, outcome = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(outcome.values())
    assert converted.config.dtype == torch.float32
    ids = torch.tensor([[1, 3, 8, 4, 7, 2]])
    assert torch.equal(converted(ids).logits, original(ids).logits)


def test_configuration_and_generation_defaults_are_kept(original: LlamaForCausalLM, tmp_path: Path) -> None:
    convert(write(tmp_path / "model.gguf", original), tmp_path, torch.float16)
    config = LlamaConfig.from_pretrained(tmp_path)
    assert config.dtype == torch.float16
    for name in ("head_dim", "num_key_value_heads", "max_position_embeddings", "rope_parameters"):
        assert getattr(config, name) == getattr(CONFIG, name)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == 2


def test_the_tokenizer_splits_digits(original: LlamaForCausalLM, tmp_path: Path) -> None:
    convert(write(tmp_path / "model.gguf", original), tmp_path, torch.float16)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.tokenize("<|start|>ab  12<|end|>") == ["<|start|>", "ab", "ĠĠ", "1", "2", "<|end|>"]
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.model_max_length) == ("<|end|>", "<|start|>", 64)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab"


@pytest.mark.parametrize(
    ("damaged", "reason"),
    [
        (lambda file, model: write(file, model, architecture="mamba"), "architecture is 'mamba'; only 'llama'"),
        (lambda file, model: write(file, model, kind="qwen2"), "pre is 'qwen2'; only 'smollm'"),
        (
            lambda file, model: write(file, model, leave_out="model.layers.1.mlp.up_proj.weight"),
            r"1 of the GGUF file's tensors are missing or unknown: model\.layers\.1\.mlp\.up_proj\.weight",
        ),
    ],
)
def test_a_file_that_cannot_be_converted_is_refused(
    damaged: Callable[[Path, LlamaForCausalLM], Path], reason: str, original: LlamaForCausalLM, tmp_path: Path
) -> None:
    with pytest.raises(FailedPreconditionError, match=reason):
        convert(damaged(tmp_path / "model.gguf", original), tmp_path, torch.float16)
