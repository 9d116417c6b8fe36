import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from spectrumkv.common.errors import FailedPreconditionError
from spectrumkv.common.model import spec
from spectrumkv.common.model.spec import rope_digest, tokenizer_digest, weights_digest
from tests.tiny_models import tiny_model

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def tensors() -> Tensors:
    generator = torch.Generator().manual_seed(7)
    return {
        "a.weight": torch.randn(3, 5, generator=generator),
        "b.weight": torch.randn(4, 2, generator=generator).bfloat16(),
        "c.bias": torch.tensor(2.5),
        "d.empty": torch.empty(0, 3),
    }


def write(directory: Path, *shards: Tensors) -> Path:
    directory.mkdir(parents=True)
    if len(shards) == 1:
        save_file(shards[0], directory / "model.safetensors")
    else:
        places = {}
        for i, shard in enumerate(shards):
            file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
            save_file(shard, directory / file)
            places |= dict.fromkeys(shard, file)
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return directory


@pytest.mark.usefixtures("cache")
def test_weights_digest_does_not_depend_on_sharding_or_order(tmp_path: Path, tensors: Tensors) -> None:
    names = sorted(tensors)
    whole = weights_digest(write(tmp_path / "whole", tensors))
    shards = [{name: tensors[name] for name in names[1:]}, {names[0]: tensors[names[0]]}]
    assert weights_digest(write(tmp_path / "sharded", *shards)) == whole
    assert weights_digest(write(tmp_path / "reversed", {name: tensors[name] for name in names[::-1]})) == whole


@pytest.mark.usefixtures("cache")
def test_weights_digest_sees_every_kind_of_change(tmp_path: Path, tensors: Tensors) -> None:
    flipped = tensors["a.weight"].clone()
    flipped.view(torch.int32)[2, 4] ^= 1
    variants = [
        tensors,
        tensors | {"a.weight": flipped},
        tensors | {"a.weight": tensors["a.weight"].reshape(5, 3)},
        tensors | {"b.weight": tensors["b.weight"].view(torch.float16)},
        {name.replace("c.bias", "c.beta"): tensor for name, tensor in tensors.items()},
        {name: tensor for name, tensor in tensors.items() if name != "d.empty"},
        tensors | {"d.empty": torch.empty(3, 0)},
    ]
    digests = [weights_digest(write(tmp_path / str(i), variant)) for i, variant in enumerate(variants)]
    assert len(set(digests)) == len(variants)


def test_weights_are_hashed_once(
    cache: Path,
    tmp_path: Path,
    tensors: Tensors,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    directory = write(tmp_path / "model", tensors)
    first = weights_digest(directory)
    hashed = []
    genuine = spec._hash_weights
    monkeypatch.setattr(spec, "_hash_weights", lambda *given: hashed.append(given) or genuine(*given))
    assert weights_digest(directory) == first
    assert hashed == []

    (kept,) = (cache / "digests").iterdir()
    whole = kept.read_text()
    assert whole.endswith(f"\n{first}")
    other_digit = whole[:-1] + ("0" if whole[-1] != "0" else "1")
    for count, damaged in enumerate((whole[:80], first, other_digit), start=1):
        kept.write_text(damaged)
        caplog.clear()
        assert weights_digest(directory) == first
        assert len(hashed) == count
        assert f"cannot use the digest of the weights kept in {kept}" in caplog.text
        assert kept.read_text() == whole


@pytest.mark.usefixtures("cache")
def test_changed_files_are_hashed_again(tmp_path: Path, tensors: Tensors) -> None:
    directory = write(tmp_path / "model", tensors)
    file = directory / "model.safetensors"
    first, before = weights_digest(directory), file.stat()
    save_file(tensors | {"c.bias": torch.tensor(2.25)}, file)
    assert file.stat().st_size == before.st_size
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert weights_digest(directory) != first


def test_files_that_change_while_they_are_read_are_refused(
    cache: Path, tmp_path: Path, tensors: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write(tmp_path / "model", tensors)
    genuine = spec._hash_weights

    def hash_while_somebody_writes(*given: Any) -> str:
        digest = genuine(*given)
        save_file(tensors | {"c.bias": torch.tensor(2.25)}, directory / "model.safetensors")
        return digest

    monkeypatch.setattr(spec, "_hash_weights", hash_while_somebody_writes)
    with pytest.raises(FailedPreconditionError, match="changed while they were read"):
        weights_digest(directory)
    assert not list(cache.glob("digests/*"))


def test_a_digest_that_cannot_be_kept_is_still_returned(
    cache: Path, tmp_path: Path, tensors: Tensors, caplog: pytest.LogCaptureFixture
) -> None:
    cache.mkdir()
    (cache / "digests").mkdir()
    directory = write(tmp_path / "model", tensors)
    first = weights_digest(directory)
    (kept,) = (cache / "digests").iterdir()
    kept.unlink()
    (cache / "digests").rmdir()
    (cache / "digests").symlink_to(tmp_path / "nowhere" / "deeper")
    assert weights_digest(directory) == first
    assert "cannot keep the digest" in caplog.text


def test_a_directory_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(FailedPreconditionError, match=r"no model\.safetensors"):
        weights_digest(tmp_path)


def test_rope_digest_sees_every_parameter() -> None:
    variants = [
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "default", "rope_theta": 10000.5},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    ]
    config = AutoConfig.from_pretrained(tiny_model("llama"))
    digests = []
    for parameters in variants:
        config.rope_parameters = parameters
        digests += [rope_digest(config, 64), rope_digest(config, 80)]
    assert len(set(digests)) == 2 * len(variants)
    config.rope_parameters = {"factor": None, "rope_theta": 10000.0, "rope_type": "default"}
    assert rope_digest(config, 64) == digests[0]


def test_tokenizer_digest_is_of_the_tokenizer_and_not_of_its_use() -> None:
    def fresh() -> PreTrainedTokenizerFast:
        return AutoTokenizer.from_pretrained(tiny_model("llama"))

    first = tokenizer_digest(fresh())
    used = fresh()
    used(["a", "longer text"], padding=True, truncation=True, max_length=2)
    assert tokenizer_digest(used) == first
    grown = fresh()
    grown.add_tokens(["<new>"])
    other_end = fresh()
    other_end.eos_token = "<|endoftext|>"
    assert len({first, tokenizer_digest(grown), tokenizer_digest(other_end)}) == 3
