"""A producer with ranks that serve over gRPC, and a consumer's pages, without vLLM."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import grpc
import torch

from spectrumkv.common.kv.geometry import HeadRange, KvGeometry
from spectrumkv.common.model.spec import ModelSpec
from spectrumkv.common.rpc.channel import open_channel
from spectrumkv.common.security import ChannelSecurity
from spectrumkv.vllm_plugin.decode.bases import StreamBases
from spectrumkv.vllm_plugin.decode.fetcher import ConsumerRank, Fetch
from spectrumkv.vllm_plugin.decode.prefetch import Prefetch
from spectrumkv.vllm_plugin.layers import EngineLayer, PageReader, slots_of
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
        self.tally, self.goes_on = Tally.empty(), threading.Event()
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

    def compute(
        self, policy: str, budget: float, chunks: list[int], fetches: int = 1, stops_at: int | None = None
    ) -> None:
        """Compute a prompt; before the layer `stops_at` wait until `goes_on` is set."""
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
                if layer.index == stops_at:
                    assert self.goes_on.wait(PATIENCE)
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


def consuming(rank: int, ranks: int, layers: list[EngineLayer]) -> ConsumerRank:
    return ConsumerRank(spec(), GEOMETRY, rank, ranks, layers, PAGE_TOKENS)


def fetch(
    workers: list[ProducingRank],
    rank: int,
    ranks: int,
    skip: int = 0,
    tokens: int = TOKENS,
    security: ChannelSecurity = ChannelSecurity(),  # noqa: B008  # frozen
    prefetch: Prefetch | None = None,
) -> tuple[list[EngineLayer], Tally]:
    heads = HeadRange.of_rank(rank, ranks, GEOMETRY.kv_heads)
    layers, tally = fake_layers(3, heads.count, 32), Tally.empty()
    consumer = consuming(rank, ranks, layers)
    load = Load("d", "t", (), tokens, skip, THEIR_BLOCKS)
    opened = channels(workers, security)
    try:
        Fetch(load, consumer, StreamBases(GEOMETRY), PATIENCE, tally, prefetch).run(opened)
    finally:
        for channel in opened:
            channel.close()
    return layers, tally


def read(layers: list[EngineLayer], tokens: int = TOKENS) -> torch.Tensor:
    """What lies in a consumer's pages: `[layers, 2, tokens, heads, head_dim]`."""
    reader, pages = PageReader(layers[0]), torch.tensor(THEIR_BLOCKS)
    both = [torch.stack(reader.read(layer, pages, tokens)).transpose(1, 2) for layer in layers]
    return torch.stack(both)
