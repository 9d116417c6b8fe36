import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from spectrumkv.common.model.embedded import embedded_model_directory
from tests.common.generation.tokenizers_for_tests import byte_level


def _chat() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(embedded_model_directory())


def _plain() -> PreTrainedTokenizerFast:
    tokenizer = _chat()
    tokenizer.chat_template = None
    return tokenizer


def _merging_at_the_seam() -> PreTrainedTokenizerFast:
    """As Llama 3 and Qwen do, it has one token for a full stop and the blank line after it."""
    tokenizer = _chat()
    tokenizer.add_tokens([".\n\n"])
    return tokenizer


KINDS = {
    "chat": _chat,
    "plain": _plain,
    "merging": _merging_at_the_seam,
    "bytes": byte_level,
}


@pytest.fixture(params=KINDS, scope="session")
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return KINDS[request.param]()


@pytest.fixture(scope="session")
def chat() -> PreTrainedTokenizerFast:
    return _chat()
