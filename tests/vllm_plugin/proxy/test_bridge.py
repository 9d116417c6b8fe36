"""KV that a connector hands out reaches our own decode service, which goes on as after our own prefill."""

import pytest

from spectrumkv.common.errors import FailedPreconditionError, NotFoundError
from spectrumkv.common.generation.params import SamplingParams
from spectrumkv.common.kv.geometry import HeadRange
from spectrumkv.common.rpc.channel import open_channel
from spectrumkv.vllm_plugin.proxy.bridge import BridgedDecode, HandedOut
from tests.services.pair import Pair
from tests.vllm_plugin.proxy.handed_out import PATIENCE, PROMPT, TOKENS, given_up, handed_out, own


def bridged(pair: Pair, port: int, first: int) -> list[int]:
    prompt = HandedOut("t", "d", PROMPT, first, SamplingParams(max_tokens=TOKENS, ignore_eos=True))
    producer, decode = open_channel(f"127.0.0.1:{port}"), open_channel(f"127.0.0.1:{pair.decode_port}")
    with producer, decode:
        return [first, *(one.token_id for one in BridgedDecode(prompt, producer, decode, PATIENCE).tokens())]


@pytest.mark.parametrize(("policy", "budget"), [("native", 1.0), ("spectral", 0.5)])
def test_our_decode_goes_on_as_after_our_own_prefill(pair: Pair, policy: str, budget: float) -> None:
    with handed_out(pair.prefill, policy, budget, HeadRange(0, pair.prefill.geometry.kv_heads)) as (port, first):
        assert bridged(pair, port, first) == [one.token_id for one in own(pair, policy, budget)]


def test_a_part_of_the_heads_is_refused(pair: Pair) -> None:
    with handed_out(pair.prefill, "native", 1.0, HeadRange(0, 1)) as (port, first):
        with pytest.raises(FailedPreconditionError, match="without tensor parallelism"):
            bridged(pair, port, first)
        given_up(port)


def test_kv_that_is_gone_is_refused(pair: Pair) -> None:
    with handed_out(pair.prefill, "native", 1.0, HeadRange(0, pair.prefill.geometry.kv_heads)) as (port, first):
        bridged(pair, port, first)
        with pytest.raises(NotFoundError):
            bridged(pair, port, first)
