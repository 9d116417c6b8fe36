"""A model is described alike whether its weights are in memory or not."""

from pathlib import Path

import torch

from spectrumkv.common.model.description import spec_of_directory
from spectrumkv.common.model.directory import find_model
from spectrumkv.common.model.load import LoadedModel
from tests.tiny_models import ARCHITECTURES, tiny_model


def test_a_directory_is_described_as_the_model_loaded_from_it(loaded: LoadedModel) -> None:
    directories = {path.resolve().name: path for path in map(tiny_model, ARCHITECTURES)}
    directory = directories[loaded.name]
    assert loaded.spec.differences(spec_of_directory(directory, loaded.dtype)) == []


def test_the_dtype_is_the_callers(cache: Path) -> None:
    _, directory = find_model(str(tiny_model("llama")))
    one, other = (spec_of_directory(directory, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert [difference.field for difference in one.differences(other)] == ["dtype"]
