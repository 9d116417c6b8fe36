from functools import cache

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from spectrumkv.common.generation.vocabulary import Vocabulary
from spectrumkv.common.model.embedded import embedded_model_directory
from tests.common.generation.tokenizers_for_tests import KINDS


@cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    if kind == "embedded":
        return AutoTokenizer.from_pretrained(embedded_model_directory())
    return KINDS[kind]()


@pytest.fixture(params=[*KINDS, "embedded"], scope="session")
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """Each kind of tokenizer, the default model's among them."""
    return tokenizer_of(request.param)


@pytest.fixture(scope="session")
def embedded() -> PreTrainedTokenizerFast:
    return tokenizer_of("embedded")


@pytest.fixture(scope="session")
def byte_level() -> PreTrainedTokenizerFast:
    return tokenizer_of("byte_level")


@pytest.fixture(scope="session")
def byte_fallback() -> PreTrainedTokenizerFast:
    return tokenizer_of("byte_fallback")


@pytest.fixture(scope="session")
def vocabulary(embedded: PreTrainedTokenizerFast) -> Vocabulary:
    """The default model's tokens."""
    return Vocabulary(embedded, frozenset({embedded.eos_token_id}), len(embedded))
