import pytest
from tokenizers.processors import TemplateProcessing

from spectrumkv.common.generation.beginning import beginning_token, begun
from spectrumkv.common.model.load import LoadedModel, load_model
from spectrumkv.prefill_server.tuning.probe.questions import prose_stretches
from tests.tiny_models import tiny_model


@pytest.fixture
def loaded() -> LoadedModel:
    """A model of the test's own, whose tokenizer puts nothing before a text."""
    return load_model(str(tiny_model("llama")), "cpu")


def put_before_texts(loaded: LoadedModel, token: str, token_id: int) -> None:
    processor = TemplateProcessing(single=f"{token} $A", special_tokens=[(token, token_id)])
    loaded.tokenizer.backend_tokenizer.post_processor = processor


def test_texts_begin_with_what_the_tokenizer_begins_them_with(loaded: LoadedModel) -> None:
    assert beginning_token(loaded.tokenizer) is None
    put_before_texts(loaded, "<|im_start|>", 1)
    assert loaded.tokenizer.bos_token_id == beginning_token(loaded.tokenizer) == 1
    # Another token, such as BERT's class, begins no text.
    put_before_texts(loaded, "<|im_end|>", 2)
    assert beginning_token(loaded.tokenizer) is None


def test_a_stretch_keeps_its_length() -> None:
    assert begun([5, 6, 7], None) == [5, 6, 7]
    assert begun([5, 6, 7], 1) == [1, 6, 7]
    assert begun([5], 1) == [1]


def test_prose_of_the_probe_begins_so_too(loaded: LoadedModel) -> None:
    plain = prose_stretches(loaded)
    put_before_texts(loaded, "<|im_start|>", 1)
    for one, other in zip(prose_stretches(loaded), plain, strict=True):
        assert one.context == (1, *other.context[1:])
        assert one.scored == other.scored
