"""Weights that the memory cannot hold are refused before they are read."""

from pathlib import Path

import pytest
import torch

from spectrumkv.common.errors import FailedPreconditionError
from spectrumkv.common.model.files.footprint import check_weights_fit, weights_bytes
from spectrumkv.common.model.load import load_model
from spectrumkv.common.service import machine
from tests.tiny_models import tiny_model, write_weights_that_no_memory_holds


def test_headers_tell_what_the_weights_take() -> None:
    directory = tiny_model("llama")
    model = load_model(str(directory), "cpu", "float32", packed=False).model
    assert weights_bytes(directory, torch.float32) == sum(one.nbytes for one in model.parameters())
    assert weights_bytes(directory, torch.bfloat16) * 2 == weights_bytes(directory, torch.float32)


def test_weights_that_do_not_fit_are_refused_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tiny_model("llama")
    needed = weights_bytes(directory, torch.float32)
    monkeypatch.setattr(machine, "bytes_left", lambda: needed)
    check_weights_fit(directory, torch.float32)
    monkeypatch.setattr(machine, "bytes_left", lambda: needed - 1)
    with pytest.raises(
        FailedPreconditionError, match=rf"take {needed} bytes as float32, .* {needed - 1} are left; give"
    ):
        load_model(str(directory), "cpu", "float32")
    monkeypatch.setattr(machine, "bytes_left", lambda: None)
    check_weights_fit(directory, torch.float32)


def test_a_file_larger_than_the_memory_is_weighed_by_its_header(tmp_path: Path) -> None:
    write_weights_that_no_memory_holds(tmp_path / "model.safetensors")
    with pytest.raises(FailedPreconditionError, match=r"as bfloat16, .* are left; give the service more memory"):
        check_weights_fit(tmp_path, torch.bfloat16)
