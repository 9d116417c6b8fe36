"""What the connector taps in vLLM is what our own prefill sees of the same prompt."""

import torch

from spectrumkv.common.kv.allocation import Int4Layers, PolicyTiers
from spectrumkv.common.kv.policies import policies
from spectrumkv.common.kv.segment import KvSegment
from spectrumkv.common.kv.wire import ChunkReader, KvChunk
from spectrumkv.common.model.load import load_model
from spectrumkv.common.rpc.channel import open_channel
from spectrumkv.common.rpc.transfer_methods import begin_fetch, expect_header
from spectrumkv.prefill_server.engine.attention import ATTENTION_NAME
from spectrumkv.prefill_server.tuning.replay import capture_prompt
from spectrumkv.v1 import transfer_pb2
from tests.tiny_models import tiny_model
from tests.vllm_plugin.engine.conftest import Servers
from tests.vllm_plugin.engine.test_servers import prefilled, prompt

# Chunks of 128: the last 64 queries come from two of them.
PROMPT_TOKENS, WINDOW, BUDGET, SECONDS = 300, 64, 0.4, 60.0
# Scores differ in their last bits, and tokens whose scores are nearly equal may change places.
MOST_OTHER_TIERS = 0.01


def fetched(params: dict[str, object], model: object) -> tuple[transfer_pb2.TransferHeader, list[KvSegment]]:
    request = transfer_pb2.FetchRequest(
        transfer_id=str(params["transfer_id"]), request_id="test", model=model, rank=0, ranks=1
    )
    with open_channel(f"{params['remote_host']}:{params['remote_port']}") as channel:
        messages = begin_fetch(channel, request, SECONDS)
        header = expect_header(messages)
        reader = ChunkReader(model.layers, header.tokens)  # type: ignore[attr-defined]
        return header, [one for message in messages if isinstance(message, KvChunk) for one in reader.read(message)]


def test_tiers_are_those_of_our_own_capture(servers: Servers) -> None:
    tokens = prompt(PROMPT_TOKENS)
    _, params = prefilled(servers, tokens, policy="adaptive", budget=BUDGET)
    loaded = load_model(str(tiny_model("llama")), "cpu", "float32")
    header, segments = fetched(params, loaded.spec.to_proto())
    assert (header.tokens, header.window, header.policy) == (PROMPT_TOKENS, WINDOW, "adaptive")
    arrived = torch.zeros(loaded.geometry.layers, PROMPT_TOKENS, dtype=torch.uint8)
    for one in segments:
        arrived[one.layer, one.first_token : one.first_token + one.tiers.numel()] = one.tiers
    loaded.model.set_attn_implementation(ATTENTION_NAME)
    captured = capture_prompt(loaded.model, tokens, WINDOW)
    own = PolicyTiers(policies.get("adaptive"), BUDGET, "attention", Int4Layers(), 0, loaded.geometry.layers)
    expected = torch.stack([torch.as_tensor(own.tiers(layer)) for layer in captured.layers])
    assert float((arrived != expected).float().mean()) <= MOST_OTHER_TIERS
    assert len(expected.unique()) > 1
