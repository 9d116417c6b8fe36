"""A prompt's KV from the pages of one engine to those of another, over gRPC, whichever ranks both have."""

from pathlib import Path

import pytest
import torch

from spectrumkv.common.errors import (
    FailedPreconditionError,
    NotFoundError,
    SpectrumKVError,
    UnauthenticatedError,
)
from spectrumkv.common.kv.geometry import HeadRange
from spectrumkv.common.security import ChannelSecurity
from tests.vllm_plugin.fake_engine import PAGE_TOKENS
from tests.vllm_plugin.transfers import GEOMETRY, TOKENS, fetch, producing, read, states


@pytest.mark.parametrize(("producers", "consumers"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 2), (2, 4), (8, 1), (1, 8)])
def test_native_arrives_bit_for_bit_between_any_ranks(producers: int, consumers: int) -> None:
    with producing(producers) as workers:
        for one in workers:
            one.compute("native", 1.0, [TOKENS])
        for rank in range(consumers):
            heads = HeadRange.of_rank(rank, consumers, GEOMETRY.kv_heads)
            layers, _ = fetch(workers, rank, consumers)
            assert torch.equal(read(layers), states()[:, :, :, heads.first : heads.end])
        if producers <= GEOMETRY.kv_heads:
            assert [one.outbox.used_bytes for one in workers] == [0] * producers


@pytest.mark.parametrize("chunks", [[70], [32, 32, 6], [66, 4]])
def test_a_budget_is_kept_however_prefill_was_cut(chunks: list[int]) -> None:
    with producing(1) as (worker,):
        worker.compute("spectral", 0.5, chunks)
        layers, tally = fetch([worker], 0, 1)
    sent, arrived = states(), read(layers)
    assert float((arrived - sent).square().mean() / sent.square().mean()) < 0.05
    fetched = tally.take()
    assert fetched["kv_bytes_fetched_total"]["spectral"] <= 0.5 * GEOMETRY.fp16_bytes(TOKENS)
    assert fetched["kv_tokens_loaded_total"] == {"spectral": TOKENS}


@pytest.mark.parametrize(("producers", "consumers"), [(2, 1), (1, 2)])
def test_a_budget_is_kept_between_other_ranks(producers: int, consumers: int) -> None:
    with producing(producers) as workers:
        for one in workers:
            one.compute("spectral", 0.5, [TOKENS])
        for rank in range(consumers):
            heads = HeadRange.of_rank(rank, consumers, GEOMETRY.kv_heads)
            layers, _ = fetch(workers, rank, consumers)
            sent = states()[:, :, :, heads.first : heads.end]
            assert float((read(layers) - sent).square().mean() / sent.square().mean()) < 0.05


def test_tokens_that_are_here_already_are_not_written() -> None:
    with producing(1) as (worker,):
        worker.compute("native", 1.0, [TOKENS])
        layers, tally = fetch([worker], 0, 1, skip=2 * PAGE_TOKENS)
    arrived = read(layers)
    assert torch.equal(arrived[:, :, 2 * PAGE_TOKENS :], states()[:, :, 2 * PAGE_TOKENS :])
    assert not arrived[:, :, : 2 * PAGE_TOKENS].any()
    assert tally.take()["kv_tokens_loaded_total"] == {"native": TOKENS - 2 * PAGE_TOKENS}


@pytest.mark.parametrize(
    ("policy", "budget", "reason"),
    [("pdtrim", 0.5, "drops_tokens"), ("no-such", 0.5, "invalid_argument"), ("greedy", 0.1, "invalid_argument")],
)
def test_what_cannot_be_kept_is_exact_and_counted(policy: str, budget: float, reason: str) -> None:
    with producing(1) as (worker,):
        worker.compute(policy, budget, [TOKENS])
        layers, _ = fetch([worker], 0, 1)
        assert worker.tally.take()["kv_fallbacks_total"] == {reason: 1}
    assert torch.equal(read(layers), states())


def test_a_second_fetch_is_refused_at_once() -> None:
    with producing(1) as (worker,):
        worker.compute("native", 1.0, [TOKENS])
        fetch([worker], 0, 1)
        with pytest.raises(NotFoundError):
            fetch([worker], 0, 1)


def test_a_consumer_that_expects_other_tokens_fails() -> None:
    with producing(1) as (worker,):
        worker.compute("native", 1.0, [TOKENS])
        with pytest.raises(FailedPreconditionError, match="70 tokens and the request expects 69"):
            fetch([worker], 0, 1, tokens=TOKENS - 1)


def test_a_prompt_that_does_not_fit_the_outbox_is_refused_and_leaves_nothing() -> None:
    with producing(1) as (worker,):
        worker.outbox._memory_bytes = 1000
        worker.compute("native", 1.0, [TOKENS])
        with pytest.raises(SpectrumKVError, match="outbox_memory"):
            fetch([worker], 0, 1)
        assert worker.outbox.used_bytes == 0


def test_a_token_is_asked_for_where_the_producer_has_a_file_of_them(tmp_path: Path) -> None:
    tokens, others = tmp_path / "tokens", tmp_path / "others"
    tokens.write_text("decode:0123456789abcdef\n")
    others.write_text("decode:fedcba9876543210\n")
    with producing(1, token_file=str(tokens)) as (worker,):
        worker.compute("native", 1.0, [TOKENS])
        for security in (ChannelSecurity(), ChannelSecurity(token_file=others)):
            with pytest.raises(UnauthenticatedError):
                fetch([worker], 0, 1, security=security)
        layers, _ = fetch([worker], 0, 1, security=ChannelSecurity(token_file=tokens))
    assert torch.equal(read(layers), states())


def test_kv_crosses_in_tls_and_certificates_are_asked_for(tmp_path: Path) -> None:
    # cryptography is among the tools of development, which vLLM's environment may lack.
    certificates = pytest.importorskip("tests.common.security.certificates")
    authority, stranger = certificates.Authority("ours"), certificates.Authority("another")
    mine = authority.issue("prefill").write(tmp_path / "prefill", authority)
    theirs = authority.issue("decode").write(tmp_path / "decode", authority)
    strange = stranger.issue("decode").write(tmp_path / "stranger", authority)
    files = {"tls_cert": str(mine.cert), "tls_key": str(mine.key), "tls_ca": str(mine.ca)}
    with producing(1, **files) as (worker,):
        worker.compute("native", 1.0, [TOKENS])
        for security in (ChannelSecurity(), ChannelSecurity(tls=strange)):
            with pytest.raises(SpectrumKVError):
                fetch([worker], 0, 1, security=security)
        layers, _ = fetch([worker], 0, 1, security=ChannelSecurity(tls=theirs))
    assert torch.equal(read(layers), states())
