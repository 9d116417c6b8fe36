from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.kv.codecs.calibrated.basis import CalibratedBasis
from spectrumkv.common.kv.codecs.spectral.layout import TokenClasses
from spectrumkv.common.kv.codecs.spectral.segment_codec import UncodedSegment, decode_segment, encode_segment
from spectrumkv.common.kv.codecs.spectral.transform import LayerTransform
from spectrumkv.common.model.load import LoadedModel, load_model
from spectrumkv.kernels.step_classes import LOWEST_CLASS
from spectrumkv.prefill_server.engine.engine import PrefillEngine
from spectrumkv.prefill_server.tuning import basis_cache
from spectrumkv.prefill_server.tuning.basis_cache import default_excerpts, resolve_basis
from spectrumkv.prefill_server.tuning.calibration import _continuing, calibrate, rotary_parameters
from spectrumkv.prefill_server.tuning.replay import capture_prompt
from tests.tiny_models import ARCHITECTURES, tiny_model


def prepared(architecture: str) -> LoadedModel:
    loaded = load_model(str(tiny_model(architecture)), "cpu", "auto")
    PrefillEngine(loaded, window=64).stop()
    return loaded


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_reading_on_over_a_prefix_is_what_the_model_does(architecture: str) -> None:
    loaded = prepared(architecture)
    ids = torch.arange(200, 290)
    captured = capture_prompt(loaded.model, ids[:60].tolist(), 64)
    prefix = [(layer.keys, layer.values) for layer in captured.layers]
    with _continuing(loaded.model), torch.inference_mode():
        positions = torch.arange(60, 90)[None]
        logits = loaded.model(input_ids=ids[None, 60:], position_ids=positions, use_cache=False, prefix=prefix).logits
    softcapped = getattr(loaded.model.config, "attn_logit_softcapping", None) is not None
    reference = AutoModelForCausalLM.from_pretrained(
        tiny_model(architecture), dtype=torch.float32, attn_implementation="eager" if softcapped else "sdpa"
    )
    with torch.inference_mode():
        expected = reference(input_ids=ids[None]).logits[:, 60:]
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rotary_parameters_are_those_that_each_layer_turns_its_keys_by(architecture: str) -> None:
    model = load_model(str(tiny_model(architecture)), "cpu").model
    frequencies, scaling = rotary_parameters(model)
    given: list[tuple[torch.Tensor, torch.Tensor]] = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda *called: given.append(called[-1]["position_embeddings"]), with_kwargs=True
        )
    with torch.inference_mode():
        model(input_ids=torch.tensor([[5, 6]]), position_ids=torch.tensor([[300, 301]]), use_cache=False)
    assert len(given) == len(frequencies) == len(scaling)
    for turned, one, factor in zip(given, frequencies, scaling, strict=True):
        angles = torch.tensor([300.0, 301.0], dtype=torch.float64)[:, None] * one.repeat(2)
        for found, expected in zip(turned, (angles.cos(), angles.sin()), strict=True):
            torch.testing.assert_close(found[0], (expected * factor).float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_excerpts_begin_as_the_tokenizer_begins_texts(architecture: str) -> None:
    loaded = load_model(str(tiny_model(architecture)), "cpu")
    plain = default_excerpts(loaded)
    loaded.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", loaded.tokenizer.bos_token_id)]
    )
    begun = default_excerpts(loaded)
    assert {int(one.token_ids[0]) for one in begun} == {loaded.tokenizer.bos_token_id}
    for one, other in zip(plain, begun, strict=True):
        assert one.context == other.context
        assert torch.equal(one.token_ids[1:], other.token_ids[1:])


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_basis_is_found_for_every_architecture(architecture: str) -> None:
    loaded = prepared(architecture)
    excerpts = default_excerpts(loaded)[:2]
    done: list[int] = []
    basis = calibrate(loaded, excerpts, done.append)
    assert done == [1, 2]
    basis.check_fits(loaded.geometry)
    assert (basis.std.diff(dim=-1) <= basis.std[..., :-1] * 0.5 + 1e-6).all()
    seen: list[LayerCapture] = list(capture_prompt(loaded.model, excerpts[0].token_ids[:70].tolist(), 64).layers)
    for capture in seen:
        transform = LayerTransform(basis, capture.layer)
        keys, values = torch.empty_like(capture.keys), torch.empty_like(capture.values)
        classes = TokenClasses(np.full(capture.tokens, LOWEST_CLASS), sinks=0)
        segment = UncodedSegment(transform, 0, capture.keys, capture.values, classes)
        fine = float(basis.std[capture.layer].min().log2()) - 6
        body, _ = encode_segment(segment, fine, loaded.geometry)
        decode_segment(transform, memoryview(body), 0, loaded.geometry, keys, values)
        scale = capture.keys.abs().max()
        torch.testing.assert_close(keys / scale, capture.keys / scale, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(values, capture.values, rtol=1e-3, atol=1e-3 * float(values.abs().max()))


@pytest.mark.slow
def test_a_basis_is_kept(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECTRUMKV_CACHE", str(tmp_path))
    loaded = prepared("qwen3")
    done: list[int] = []
    first = resolve_basis(loaded, done.append)
    assert done == list(range(1, 9))
    again = resolve_basis(loaded, lambda _: pytest.fail("the model is calibrated again"))
    assert again.digest == first.digest


@pytest.fixture(scope="module")
def llama() -> LoadedModel:
    """Found before the cache directory is another one."""
    return prepared("llama")


def older_layout(whole: bytes) -> bytes:
    """The basis as it was when all layers had one rotation."""
    tensors = load(whole)
    rotation = {name: tensors[name][:1] for name in ("rope_frequencies", "rope_scaling")}
    return save(tensors | rotation | {"rope_frequencies": rotation["rope_frequencies"][0].clone()})


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "empty": lambda whole: b"",
    "another file": lambda whole: b"not safetensors",
    "lost": lambda whole: None,
    "one bit": lambda whole: whole[:-1] + bytes([whole[-1] ^ 1]),
    "older layout": older_layout,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_basis_is_calibrated_again(
    damage: str,
    llama: LoadedModel,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    found = calibrate(llama, default_excerpts(llama)[:1], lambda done: None)
    calibrated: list[LoadedModel] = []

    def calibrate_again(loaded: LoadedModel, *_: object) -> CalibratedBasis:
        calibrated.append(loaded)
        return found

    monkeypatch.setattr(basis_cache, "calibrate", calibrate_again)
    assert resolve_basis(llama, lambda done: None).digest == found.digest
    (file,) = (cache / "bases").glob(f"*/{basis_cache.BASIS_FILE}")
    content = DAMAGES[damage](file.read_bytes())
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    for _ in range(2):
        assert resolve_basis(llama, lambda done: None).digest == found.digest
    assert len(calibrated) == 2
    assert f"cannot use the model's basis kept in {file.parent}" in caplog.text
