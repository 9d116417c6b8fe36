"""A prompt whose KV a connector hands out, without vLLM, and what our own services make of the same prompt."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from spectrumkv.client.completion import TokenEvent
from spectrumkv.client.request import KvChoice, Sampling, TokenIds
from spectrumkv.common.kv.geometry import HeadRange
from spectrumkv.common.model.load import LoadedModel
from spectrumkv.common.rpc.channel import open_channel
from spectrumkv.common.rpc.transfer_methods import release
from spectrumkv.prefill_server.tuning.basis_cache import resolve_basis
from spectrumkv.prefill_server.tuning.replay import capture_prompt
from spectrumkv.v1 import transfer_pb2
from spectrumkv.vllm_plugin.options import ConnectorOptions
from spectrumkv.vllm_plugin.prefill.coder import Coder
from spectrumkv.vllm_plugin.prefill.outbox import Outbox
from spectrumkv.vllm_plugin.prefill.plans import Planner
from spectrumkv.vllm_plugin.prefill.service import TransferService, start_server
from spectrumkv.vllm_plugin.scheduler.steps import PrefillStep
from spectrumkv.vllm_plugin.stats import Tally
from tests.services.pair import Pair

PROMPT = [5 + 37 * number % 4000 for number in range(90)]
TOKENS, PATIENCE = 6, 30.0


@contextmanager
def handed_out(loaded: LoadedModel, policy: str, budget: float, heads: HeadRange) -> Iterator[tuple[int, int]]:
    """A connector that hands the prompt out: its port, and the first token."""
    basis, geometry = resolve_basis(loaded, lambda done: None), loaded.geometry.of_heads(heads)
    options, outbox, tally = ConnectorOptions.of({"listen": "127.0.0.1:0"}), Outbox(64 << 20, 60.0), Tally.empty()
    planner = Planner(options, geometry, basis.of_heads(heads))
    coder = Coder(planner, basis.digest, geometry, heads, outbox, 64 << 10, torch.device("cpu"), tally)
    coder.start()
    server, port = start_server(
        TransferService(loaded.spec, heads, outbox, basis, PATIENCE), options, 0, lambda _: None
    )
    try:
        captured = capture_prompt(loaded.model, PROMPT, options.window)
        step = PrefillStep("r", "t", len(PROMPT), 0, len(PROMPT), (), policy, budget, 1)
        assert coder.reserve(step)
        span = slice(heads.first, heads.end)
        group = captured.layers[0].queries.shape[0] // loaded.geometry.kv_heads
        of_queries = slice(heads.first * group, heads.end * group)
        for layer in captured.layers:
            part = {"queries": layer.queries[of_queries], "keys": layer.keys[span], "values": layer.values[span]}
            coder.put(step, type(layer)(**(vars(layer) | part)))
        yield port, captured.first_token
    finally:
        server.drain(0, threading.Event())
        coder.stop()
        assert outbox.used_bytes == 0


def own(pair: Pair, policy: str, budget: float) -> list[TokenEvent]:
    sampling = Sampling(max_tokens=TOKENS, ignore_eos=True)
    with pair.client() as client:
        stream = client.generate(TokenIds(PROMPT), sampling=sampling, kv=KvChoice(policy=policy, budget=budget))
        return list(stream)


def given_up(port: int) -> None:
    with open_channel(f"127.0.0.1:{port}") as channel:
        release(channel, transfer_pb2.ReleaseRequest(transfer_id="t", request_id="d"), PATIENCE).result()
