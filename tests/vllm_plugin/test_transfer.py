"""A prompt's KV from the pages of one engine to those of another, over gRPC, whichever ranks both have."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import pytest
import torch

from spectrumkv.common.errors import (
    FailedPreconditionError,
    NotFoundError,
    SpectrumKVError,
    UnauthenticatedError,
)
from spectrumkv.common.kv.geometry import HeadRange, KvGeometry
from spectrumkv.common.model.spec import ModelSpec
from spectrumkv.common.rpc.channel import open_channel
from spectrumkv.common.security import ChannelSecurity
from spectrumkv.vllm_plugin.decode.bases import StreamBases
from spectrumkv.vllm_plugin.decode.fetcher import ConsumerRank, Fetch
from spectrumkv.vllm_plugin.layers import EngineLayer, slots_of
from spectrumkv.vllm_plugin.options import ConnectorOptions
from spectrumkv.vllm_plugin.prefill.coder import Coder
from spectrumkv.vllm_plugin.prefill.outbox import Outbox
from spectrumkv.vllm_plugin.prefill.plans import Planner
from spectrumkv.vllm_plugin.prefill.service import TransferService, start_server
from spectrumkv.vllm_plugin.prefill.worker import ProducerWorker
from spectrumkv.vllm_plugin.scheduler.steps import Load, PrefillStep, ProducerStep
from spectrumkv.vllm_plugin.stats import Tally
from tests.common.kv.codecs.spectral_prompts import basis_of
from tests.vllm_plugin.fake_engine import PAGE_TOKENS, fake_layers

GEOMETRY = KvGeometry(layers=3, kv_heads=4, head_dim=32, native_dtype=torch.float32)
TOKENS, BLOCKS = 70, (4, 1, 9, 2, 0)
THEIR_BLOCKS = (3, 5, 6, 7, 8)
DIGEST = "0" * 64
# The first coding compiles, which takes seconds on a busy machine.
PATIENCE = 60.0


def spec() -> ModelSpec:
    return ModelSpec("llama", DIGEST, 3, 4, 32, "float32", DIGEST, DIGEST, 100, 1000)


def states() -> torch.Tensor:
    """Keys and values of all heads, `[layers, 2, tokens, kv_heads, head_dim]`."""
    return torch.randn(3, 2, TOKENS, 4, 32, generator=torch.Generator().manual_seed(1))


class ProducingRank:
    """One producing worker with its server; `compute` stands in for vLLM's forward passes."""

    def __init__(self, rank: int, ranks: int, **security: str) -> None:
        self.heads = HeadRange.of_rank(rank, ranks, GEOMETRY.kv_heads)
        self.tally = Tally.empty()
        options = ConnectorOptions.of({"listen": "127.0.0.1:0", "window": 8} | security)
        basis, geometry = basis_of(GEOMETRY), GEOMETRY.of_heads(self.heads)
        self.layers = fake_layers(3, self.heads.count, 32)
        self.outbox = Outbox(8 << 20, 60.0)
        planner = Planner(options, geometry, basis.of_heads(self.heads))
        self.coder = Coder(
            planner, basis.digest, geometry, self.heads, self.outbox, 4096, torch.device("cpu"), self.tally
        )
        self.coder.start()
        named = {one.name: one for one in self.layers}
        self.worker = ProducerWorker(named, PAGE_TOKENS, options.window, self.coder, self.outbox)
        service = TransferService(spec(), self.heads, self.outbox, basis, PATIENCE)
        self.server, self.port = start_server(service, options, 0, lambda code: None)

    def compute(self, policy: str, budget: float, chunks: list[int], fetches: int = 1) -> None:
        whole = states()[:, :, :, self.heads.first : self.heads.end]
        queries = torch.randn(TOKENS, self.heads.count, 32, generator=torch.Generator().manual_seed(2))
        first = 0
        for count in chunks:
            step = PrefillStep("r", "t", TOKENS, first, count, BLOCKS, policy, budget, fetches)
            self.worker.begin_step(ProducerStep((step,)))
            # Another request's row comes first in the batch.
            slots = torch.cat([torch.tensor([11 * PAGE_TOKENS]), slots_of(BLOCKS, PAGE_TOKENS, first, first + count)])
            rows = torch.cat([torch.full((1, self.heads.count, 32), torch.nan), queries[first : first + count]])
            for layer in self.layers:
                keys, values = whole[layer.index, :, first : first + count]
                layer.write(keys, values, layer.pages, slots[1:])
                self.worker.tap(layer.name, rows, slots)
                self.worker.save(layer.name)
            self.worker.end_step()
            first += count

    def stop(self) -> None:
        self.server.drain(0, threading.Event())
        self.coder.stop()


@contextmanager
def producing(ranks: int, **security: str) -> Iterator[list[ProducingRank]]:
    with ExitStack() as stopped:
        workers = [ProducingRank(rank, ranks, **security) for rank in range(ranks)]
        for one in workers:
            stopped.callback(one.stop)
        yield workers


def channels(workers: list[ProducingRank], security: ChannelSecurity) -> list[grpc.Channel]:
    return [open_channel(f"localhost:{one.port}", security) for one in workers]


def fetch(
    workers: list[ProducingRank],
    rank: int,
    ranks: int,
    skip: int = 0,
    tokens: int = TOKENS,
    security: ChannelSecurity = ChannelSecurity(),  # noqa: B008  # frozen
) -> tuple[list[EngineLayer], Tally]:
    heads = HeadRange.of_rank(rank, ranks, GEOMETRY.kv_heads)
    layers, tally = fake_layers(3, heads.count, 32), Tally.empty()
    consumer = ConsumerRank(spec(), GEOMETRY, rank, ranks, layers, PAGE_TOKENS)
    load = Load("d", "t", (), tokens, skip, THEIR_BLOCKS)
    opened = channels(workers, security)
    try:
        Fetch(load, consumer, StreamBases(GEOMETRY), PATIENCE, tally).run(opened)
    finally:
        for channel in opened:
            channel.close()
    return layers, tally


def read(layers: list[EngineLayer], tokens: int = TOKENS) -> torch.Tensor:
    """What lies in a consumer's pages: `[layers, 2, tokens, heads, head_dim]`."""
    from spectrumkv.vllm_plugin.layers import PageReader

    reader, pages = PageReader(layers[0]), torch.tensor(THEIR_BLOCKS)
    both = [torch.stack(reader.read(layer, pages, tokens)).transpose(1, 2) for layer in layers]
    return torch.stack(both)


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
