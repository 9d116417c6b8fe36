"""Prompts that prefill runs in chunks, through both services."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from spectrumkv.client.request import KvChoice
from spectrumkv.prefill_server.engine import chunked_prefill
from tests.services.kv.test_lossless import greedy, random_prompt
from tests.services.pair import Pair, running_pair
from tests.services.reference import assert_same_greedy, reference_model
from tests.tiny_models import ARCHITECTURES


@pytest.fixture(scope="module", params=ARCHITECTURES)
def pair(request: pytest.FixtureRequest, tiny_directories: dict[str, Path]) -> Iterator[Pair]:
    with pytest.MonkeyPatch.context() as patch:
        # No less than the score window.
        patch.setitem(chunked_prefill.CHUNK_TOKENS, "cpu", 64)
        with running_pair(tiny_directories[request.param], decode={"kv_memory": "64MiB"}) as running:
            yield running


@pytest.mark.slow
@pytest.mark.parametrize("length", [128, 449])
def test_output_is_that_of_one_process(pair: Pair, length: int) -> None:
    prompt = random_prompt(length)
    tokens = greedy(pair, prompt, 24)
    config = pair.prefill.model.config
    softcapped = getattr(config, "attn_logit_softcapping", None) is not None
    assert_same_greedy(reference_model(Path(config.name_or_path), softcapped), prompt, tokens)


@pytest.mark.parametrize("kv", [KvChoice(), KvChoice(policy="uniform-int8")])
def test_coded_kv_of_chunks_arrives_whole(pair: Pair, kv: KvChoice) -> None:
    assert len(greedy(pair, random_prompt(300), 8, kv)) == 8
